"""One instruction example: what a client owns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """An instruction, perhaps a context to work on, and the response to learn."""

    instruction: str
    response: str
    context: str = ""
    category: str = ""  # what partitions by label split on
    owner: str = ""  # the natural client, where the data has one (MedQuAD: the institution)
    id: str = ""  # where it came from: file:line, or a generator's counter
    rule: str = ""  # names the microworld rule that checks an answer; empty elsewhere
    private: bool = False  # a fact only its owner may know; leakage is measured on these
