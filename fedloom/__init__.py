"""fedloom: federated instruction tuning of large language models.

    import fedloom

    experiment = fedloom.load("quickstart", ["rounds=4"])
    summary = fedloom.run(experiment, "runs/mine")

The commands as functions. Importing them does not import torch; calling most of them does. To read the code,
start at `fedloom/federation.py`, the round loop.
"""

import typing as _typing
from importlib import import_module as _import
from importlib.metadata import version as _version

from fedloom.errors import FedloomError

if _typing.TYPE_CHECKING:
    from fedloom.experiment.audit import audit
    from fedloom.experiment.chat import chat
    from fedloom.experiment.commands import compare, evaluate, export, run
    from fedloom.experiment.judging import judge
    from fedloom.experiment.toml import load, recipes

    __version__: str

__all__ = [
    "FedloomError",
    "__version__",
    "audit",
    "chat",
    "compare",
    "evaluate",
    "export",
    "judge",
    "load",
    "recipes",
    "run",
]

_MODULES = {
    "audit": "audit",
    "chat": "chat",
    "compare": "commands",
    "evaluate": "commands",
    "export": "commands",
    "judge": "judging",
    "load": "toml",
    "recipes": "toml",
    "run": "commands",
}


def __getattr__(name: str) -> _typing.Any:
    if name == "__version__":
        return _version("fedloom")
    if name not in _MODULES:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    return getattr(_import(f"fedloom.experiment.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
