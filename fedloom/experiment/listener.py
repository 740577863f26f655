"""Whoever watches a training or a comparison go on: a display, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a display begins before torch is there
    from fedloom.federation import Round
    from fedloom.messages import ClientId


class Listener:
    """This one ignores it all."""

    def phase(self, what: str) -> None:
        """What begins: "reading the data", "loading the base model", "training", "measuring", "answering 8 questions"."""

    def started(self, *, rounds: int, completed: int, cohort: float) -> None: ...
    def updated(self, round: Round, client: ClientId) -> None: ...
    def committed(self, record: Mapping[str, Any]) -> None: ...
    def warned(self, message: str) -> None: ...
    def noted(self, messages: Sequence[str]) -> None: ...  # what the data's reader has to say
