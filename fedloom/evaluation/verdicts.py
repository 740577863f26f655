"""A judge's verdict on two answers. Its reply is read exactly or not at all.

A rubric names the aspects that are scored and their scale. The overall score of an answer is the mean of
its aspects. A reply that does not have the rubric's form is malformed; nothing guesses its meaning.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# A score as people write it: ASCII digits, no leading zeros, no sign, no exponent. Nothing else counts as a
# number.
_NUMBER = r"((?:0|[1-9][0-9]{0,2})(?:\.[0-9]{1,20})?)"
_PLAIN = re.compile(_NUMBER)
_TWO_NUMBERS = re.compile(rf"{_NUMBER}(?:[ \t]*,[ \t]*|[ \t]+){_NUMBER}")
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)  # reasoning models write this before they answer


@dataclass(frozen=True)
class Rubric:
    """The aspects to score. `version` changes whenever the same reply would be read differently."""

    name: str
    aspects: tuple[str, ...]
    low: float  # the scale, both ends included
    high: float
    version: int = 1

    def scores(self, first: Sequence[Any], second: Sequence[Any]) -> Scores | None:
        """None unless there is a number on the scale for every aspect of both answers."""
        values = [*first, *second]
        if len(first) != len(self.aspects) or len(second) != len(self.aspects):
            return None
        if not all(
            type(v) in (int, float) and math.isfinite(v) and self.low <= v <= self.high for v in values
        ):
            return None
        return Scores(tuple(map(float, first)), tuple(map(float, second)))


@dataclass(frozen=True)
class Scores:
    """One rating of two answers, in the order they were shown; one number for each aspect."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    def swapped(self) -> Scores:
        return Scores(self.second, self.first)


def overall(aspects: Sequence[float]) -> Fraction:
    """The exact mean: rounding must not decide whether two answers tie."""
    return sum(map(Fraction, aspects), Fraction()) / len(aspects)


@dataclass(frozen=True)
class Verdict:
    """A reply that arrived. `scores` is None if it is malformed."""

    scores: Scores | None
    reply: str = ""
    prompt_tokens: int = 0  # as the back end counted them
    reply_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """No reply arrived. `reason` is short, always the same for one cause, and quotes nothing."""

    reason: str


# FedPIT (arXiv 2403.06131): four aspects from 1 to 5. FedIT (arXiv 2305.05644), after Vicuna: a total from 1
# to 10.
ASPECTS = Rubric("aspects", ("helpfulness", "relevance", "correctness", "coherence"), 1, 5, version=2)
TOTAL = Rubric("total", ("score",), 1, 10, version=2)
RULE = Rubric("rule", ("rule",), 0, 1)
LIKELIHOOD = Rubric("likelihood", ("likelihood",), -math.inf, 0)  # nats per token of the reference


def read_aspects(reply: str) -> Scores | None:
    """One JSON object {"first": {aspect: number, ...}, "second": {...}} alone, perhaps in a code fence."""
    text = _answer_of(reply)
    fenced = _FENCED.fullmatch(text)
    try:
        said = json.loads(
            fenced[1] if fenced else text,
            object_pairs_hook=_distinct,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_number,
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.keys() != {"first", "second"}:
        return None
    sides = [said["first"], said["second"]]
    if not all(isinstance(side, dict) and side.keys() == set(ASPECTS.aspects) for side in sides):
        return None
    return ASPECTS.scores(*([side[a] for a in ASPECTS.aspects] for side in sides))


def read_total(reply: str) -> Scores | None:
    """Two numbers, alone on the first nonblank line; a rationale may follow."""
    found = _TWO_NUMBERS.fullmatch(_answer_of(reply).partition("\n")[0].rstrip())
    return TOTAL.scores([float(found[1])], [float(found[2])]) if found else None


READERS: Mapping[str, Callable[[str], Scores | None]] = {"aspects": read_aspects, "total": read_total}


def _answer_of(reply: str) -> str:
    return _THOUGHT.sub("", reply, count=1).strip() if reply.lstrip().startswith("<think>") else reply.strip()


def _number(text: str) -> float:
    if not _PLAIN.fullmatch(text):
        raise ValueError("not a plain number")
    return float(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
