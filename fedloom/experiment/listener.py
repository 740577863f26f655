"""Anything that watches a training or a comparison: a display, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a display starts before torch is loaded
    from fedloom.federation import Round
    from fedloom.messages import ClientId


class Listener:
    """Hears how a training or a comparison proceeds; this one ignores everything."""

    def phase(self, what: str) -> None:
        """The step that begins: "reading the data", "loading the base model", "answering 8 questions", ..."""

    def started(self, *, rounds: int, completed: int, cohort: float) -> None: ...
    def updated(self, round: Round, client: ClientId) -> None: ...
    def committed(self, record: Mapping[str, Any]) -> None: ...
    def warned(self, message: str) -> None: ...
    def noted(self, messages: Sequence[str]) -> None: ...  # what the data's reader has to say
