"""Which generated examples to drop: failures, repeats, near-copies of private text. Pure functions.

Every check returns a short stable reason code, which is counted and reported, or None. FedPIT's filters
(arXiv 2403.06131v3, section 3.3) are format, refusals and ROUGE-L; length and keywords are those of
Self-Instruct (github.com/yizhongw/self-instruct); verbatim overlap is ours, since a text with a long
copied passage can have a ROUGE-L far below 0.7.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.data.example import Example
from fedloom.data.text import CHARACTERS_PER_WORD, folded, length, overlap, runs, words
from fedloom.errors import ConfigError

# Tasks that a text model cannot do, or that refer to something it cannot see: Self-Instruct's list.
KEYWORDS = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
OPENERS = ("as a", "as an", "sorry", "i m sorry", "i am sorry", "i apologize", "i apologise")
_MARKER = re.compile(r"\b(task \d+|instruction|input|output|response)\s*[:：]", re.IGNORECASE)
_OPEN = "¿¡"  # Spanish questions and exclamations begin with these


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The limits. A sample exactly at a limit of length or likeness passes.

    In scripts without spaces two characters count as a word.
    """

    shortest: int = 4  # words of an instruction
    longest: int = 150
    keywords: tuple[str, ...] = KEYWORDS  # in an instruction, as whole words
    openers: tuple[str, ...] = OPENERS  # of an instruction or a response: a role, or a refusal
    rouge_instruction: float = 0.7  # to any local instruction
    rouge_example: float = 0.7  # of instruction, context and response together to any local example
    verbatim: int = 8  # drop if a local text holds the same run of this many words; 0: not checked
    repeats: int = 4  # drop if a phrase of the response occurs this many times in a row

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(f"Expected 1 <= {self.shortest=} <= {self.longest=} words.")
        if not (0 <= self.rouge_instruction <= 1 and 0 <= self.rouge_example <= 1):
            raise ConfigError(f"Expected {self.rouge_instruction=} and {self.rouge_example=} in [0, 1].")
        if self.verbatim < 0:
            raise ConfigError(f"Expected {self.verbatim=} of at least 0 words.")
        if self.repeats < 2:
            raise ConfigError(f"Expected {self.repeats=} of at least 2.")

    def instruction(self, text: str) -> str | None:
        """ "format", "refusal", "short", "long" or "keyword"."""
        said = words(text)
        if _malformed(text):
            return "format"
        if self._opens(said):
            return "refusal"
        if length(said) < self.shortest:
            return "short"
        if length(said) > self.longest:
            return "long"
        spaced = f" {' '.join(said)} "
        return "keyword" if any(f" {' '.join(words(word))} " in spaced for word in self.keywords) else None

    def response(self, text: str) -> str | None:
        """ "format", "refusal" or "repetitive"."""
        if not words(text) or _MARKER.search(text):
            return "format"
        if self._opens(words(text)):
            return "refusal"
        return "repetitive" if _repeats(words(text), self.repeats) else None

    def _opens(self, said: Sequence[str]) -> bool:
        return any(said[: len(opener)] == opener for opener in map(words, self.openers))


def _malformed(instruction: str) -> bool:
    """No words, a marker of the prompt's own format, or punctuation at the beginning."""
    return (
        not words(instruction)
        or _MARKER.search(instruction) is not None
        or not folded(instruction).lstrip(_OPEN)[:1].isalnum()
    )


def _repeats(said: Sequence[str], times: int) -> bool:
    """Does a phrase of up to eight words occur `times` times in a row?"""
    most = 8 if length(said) == len(said) else 8 * CHARACTERS_PER_WORD
    for size in range(1, most + 1):
        run = 0  # words equal to the word one phrase earlier
        for here, before in zip(said[size:], said, strict=False):
            run = run + 1 if here == before else 0
            if run >= size * (times - 1):
                return True
    return False


class LocalTexts:
    """A client's own texts, indexed so that near-copies of them are found quickly.

    The index bounds ROUGE-L from above by the words two texts share in any order, which is cheap for all
    local texts at once. The true value is computed only where that bound allows a near-copy, so none is
    missed, however many texts a client has.
    """

    def __init__(self, examples: Sequence[Example], filters: Filters):
        self._filters = filters
        self._instructions = _Index([e.instruction for e in examples])
        self._samples = _Index([whole(e) for e in examples])
        fields = (text for e in examples for text in e.texts)
        self._runs = set(_runs(fields, filters.verbatim)) if filters.verbatim else set()
        self._exact = {_folded(e) for e in examples}

    def instruction(self, text: str) -> str | None:
        """ "near-instruction": too similar to one of the client's own."""
        return (
            "near-instruction"
            if self._instructions.has_alike(text, self._filters.rouge_instruction)
            else None
        )

    def example(self, example: Example) -> str | None:
        """ "copy", "near-example" or "verbatim"."""
        if _folded(example) in self._exact:
            return "copy"
        if self._samples.has_alike(whole(example), self._filters.rouge_example):
            return "near-example"
        fields = (example.instruction, example.context, example.response)
        if self._filters.verbatim and not self._runs.isdisjoint(_runs(fields, self._filters.verbatim)):
            return "verbatim"
        return None


def whole(example: Example) -> str:
    """Instruction, context and response as one text, by which near-copies are judged."""
    return f"{example.instruction}\n{example.context}\n{example.response}"


def _folded(example: Example) -> tuple[str, ...]:
    return tuple(" ".join(words(t)) for t in (example.instruction, example.context, example.response))


def _runs(texts: Iterable[str], least: int) -> Iterable[tuple[str, ...]]:
    for text in texts:
        yield from runs(words(text), least)


class _Index:
    """Texts by their words, with counts: (word, 2) leads to the texts that hold the word at least twice."""

    def __init__(self, texts: Sequence[str]):
        self._texts = [words(text) for text in texts]
        self._lengths = np.array([len(said) for said in self._texts], dtype=np.int64)
        postings: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, said in enumerate(self._texts):
            for word, count in Counter(said).items():
                for nth in range(1, count + 1):
                    postings[word, nth].append(place)
        self._postings = {key: np.array(places) for key, places in postings.items()}

    def has_alike(self, text: str, threshold: float) -> bool:
        """Is the ROUGE-L of `text` to any of the texts above the threshold?"""
        said = words(text)
        if not said or not len(self._texts):
            return False
        keys = [(word, nth) for word, count in Counter(said).items() for nth in range(1, count + 1)]
        found = [self._postings[key] for key in keys if key in self._postings]
        if not found:
            return False
        shared = np.bincount(np.concatenate(found), minlength=len(self._texts))  # (n,) words in common
        bound = 2 * shared / (self._lengths + len(said))
        return any(
            overlap(self._texts[place], said) > threshold for place in np.flatnonzero(bound > threshold)
        )
