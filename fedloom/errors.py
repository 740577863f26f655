"""Every error fedloom raises on purpose, drawn as a tree.

    FedloomError
    ├── ConfigError          the experiment cannot be built as written
    ├── DataError            records that cannot be used
    ├── ModelError           a base model or an adapter that cannot be used
    ├── ShapeMismatch        two adapters do not have the same tensors
    ├── EmptyCohort          nobody returned an update
    ├── RefusedUpdate        an update failed the gate; the round goes on without it
    └── RunError             a run folder that cannot be written, read or resumed

The command line prints the message of any of them and exits with code 2; anything else is a bug.
"""

from __future__ import annotations


class FedloomError(Exception):
    """Base class: catch this to catch all of ours."""


class ConfigError(FedloomError, ValueError):
    """The experiment cannot be built as written."""


class DataError(FedloomError, ValueError):
    """Records that cannot be used; the message names file, line and reason, never the text."""


class ModelError(FedloomError, ValueError):
    """A base model, tokenizer or adapter that cannot be used."""


class ShapeMismatch(FedloomError, ValueError):
    """Two adapters do not have the same tensors."""


class EmptyCohort(FedloomError, RuntimeError):
    """No client returned an update with a positive weight."""


class RefusedUpdate(FedloomError, ValueError):
    """An update failed the gate. `code` is a short stable reason, counted in the journal."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class RunError(FedloomError, RuntimeError):
    """A run folder that cannot be written, read or resumed."""
