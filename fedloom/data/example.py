"""One instruction example. Clients own these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedloom.errors import DataError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation before its last question."""

    role: Role
    text: str


@dataclass(frozen=True)
class Example:
    """An instruction, perhaps a context to work on, and the response to learn.

    In a conversation the instruction is the user's last turn and the response is the answer to it. `turns`
    holds what came before: perhaps a system turn, then questions and answers in alternation.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""  # partitions by label use it
    owner: str = ""  # the natural client, if the data has one (MedQuAD: the institution)
    id: str = ""  # its origin: file:line, or a generator's counter
    rule: str = ""  # the microworld rule that checks an answer; empty elsewhere
    private: bool = False  # a fact only its owner may know; leakage is measured on these
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        # Examples stored as JSON come back with a list of mappings.
        turns = tuple(turn if isinstance(turn, Turn) else Turn(**turn) for turn in self.turns)
        object.__setattr__(self, "turns", turns)
        said = [turn.role for turn in turns]
        if (said[1:] if said[:1] == ["system"] else said) != ["user", "assistant"] * (len(said) // 2):
            raise DataError(
                f"Expected earlier turns to be an optional system turn, then user and assistant in turn, got {', '.join(said)}."
            )

    @property
    def texts(self) -> tuple[str, ...]:
        """All of its texts, in this order; the context may be empty."""
        return (*(turn.text for turn in self.turns), self.instruction, self.context, self.response)

    @property
    def question(self) -> str:
        """The question as text for a reader: earlier turns, instruction and context."""
        asked = f"{self.instruction}\n\n{self.context}" if self.context else self.instruction
        if not self.turns:
            return asked
        said = [f"{turn.role.capitalize()}: {turn.text}" for turn in self.turns]
        return "\n\n".join([*said, f"User: {asked}"])
