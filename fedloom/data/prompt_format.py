"""Prompt formats: the control tokens around people's words, and the text with slots between these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.data.chat_template import CONTEXT, INSTRUCTION, SYSTEM, turn_slot
from fedloom.data.tokenizing import Part


@dataclass(frozen=True)
class Form:
    """The format of examples of one shape: a number of earlier turns, with or without system and context."""

    parts: Sequence[Part]  # of the prompt
    lead: str  # before a response, and learnt with it
    # slot -> (strips before, strips after): spaces around its words
    strips: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    def fill(self, text: str, words: Mapping[str, str]) -> str:
        """Text with its slots filled in one pass: a slot that a user has typed stays as it is."""
        return "".join(self.stripped(slot, words[slot]) if slot in words else slot for slot in text)

    def stripped(self, slot: str, words: str) -> str:
        before, after = self.strips.get(slot, (False, False))
        words = words.lstrip() if before else words
        return words.rstrip() if after else words

    def learnt(self, answers: Sequence[str], *, end: int) -> list[tuple[Part, bool]]:
        """(part, is it learnt?). Earlier answers become separate parts, learnt with lead and end."""
        found: list[tuple[Part, bool]] = []
        closes = False  # the preceding answer extends to the control token that comes next
        for part, following in zip(self.parts, [*self.parts[1:], None], strict=True):
            if isinstance(part, int):
                found.append((part, closes))
                closes = False
                continue
            place = 0
            inside = [(part.index(slot), slot) for slot in answers if slot in part]
            for at, _ in sorted(inside):
                begin = at - len(self.lead) if part[:at].endswith(self.lead) else at
                closes = following == end and not any(ord(c) >= ord(INSTRUCTION) for c in part[at + 1 :])
                stop = len(part) if closes else at + 1
                found += [(part[place:begin], False), (part[begin:stop], True)]
                place = stop
            found.append((part[place:], False))
        return [(part, learn) for part, learn in found if part != ""]


@dataclass(frozen=True)
class Wording:
    """A format of words alone. Earlier questions are worded as without context, their answers end as
    all answers do, and `between` comes before the next question."""

    intro: str
    intro_with_context: str
    question: str
    question_with_context: str
    lead: str
    between: str

    def form(
        self, split: Callable[[str], list[Part]], *, turns: int, system: bool, context: bool, end: int
    ) -> Form:
        parts: list[Part] = []
        text = (f"{SYSTEM}\n\n" if system else "") + (self.intro_with_context if context else self.intro)
        for i in range(0, turns, 2):
            asked = self.question.replace(INSTRUCTION, turn_slot(i))
            parts += [*split(f"{text}{asked}{self.lead}{turn_slot(i + 1)}"), end]
            text = self.between
        parts += split(text + (self.question_with_context if context else self.question))
        return Form(parts, self.lead)


WORDINGS = {
    # Stanford Alpaca's (Taori et al. 2023), with alpaca-lora's newline after the last line, as FedIT uses it.
    "alpaca": Wording(
        intro="Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        intro_with_context="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n",
        question=f"### Instruction:\n{INSTRUCTION}\n\n### Response:\n",
        question_with_context=f"### Instruction:\n{INSTRUCTION}\n\n### Input:\n{CONTEXT}\n\n### Response:\n",
        lead="",
        between="\n\n",
    ),
    "plain": Wording(
        intro="",
        intro_with_context="",
        question=f"Instruction: {INSTRUCTION}\nResponse:",
        question_with_context=f"Instruction: {INSTRUCTION}\nInput: {CONTEXT}\nResponse:",
        lead=" ",
        between="\n",
    ),
}
