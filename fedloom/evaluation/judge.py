"""Pairwise judging in both orders (or in one, ours first); replies are kept, malformed ones counted.

    kept = Cache(folder / "verdicts.jsonl")
    found = compare(judge, questions, ours, theirs, cache=kept)
    found.win.share, found.order_disagreement.share, found.judged

A judge is any object with the members of `Judge`; `backends.py` has those that come with fedloom.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.evaluation.cache import Cache, key_of
from fedloom.evaluation.pairwise import Comparison, Rating, summarise
from fedloom.evaluation.verdicts import Failed, Rubric, Scores, Verdict


@dataclass(frozen=True)
class Shown:
    """Shown to a judge. The question's `response` is the reference, which not every judge uses."""

    question: Example
    first: str
    second: str


class Judge(Protocol):
    @property
    def rubric(self) -> Rubric: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that, with the pair shown, determine a verdict; no secrets, since they are stored."""
        ...

    @property
    def varies(self) -> bool:
        """May the same question get another verdict? If not, repeating and retrying are pointless."""
        ...

    def rate(self, shown: Mapping[str, Shown]) -> Generator[tuple[str, Verdict | Failed], None, None]:
        """One verdict for each key, in any order, each as soon as it arrives. A key is unique to this
        rating, repetition and attempt, so it may name the randomness of the reply. When closed early,
        it asks no more."""
        ...


@dataclass(frozen=True)
class _Place:
    """One cell of the evaluation: a question in one order, for the n-th time."""

    question: int
    swapped: bool
    repetition: int


def compare(
    judge: Judge,
    questions: Sequence[Example],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    cache: Cache,
    repeats: int = 1,
    retries: int = 2,
    both_orders: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
) -> Comparison:
    """Rate every pair in both orders, or in one with ours first, `repeats` times each, and sum up.

    A malformed reply is asked for again at most `retries` times. A reply that is still malformed after that
    is stored like any other, and later evaluations do not ask again. A rating that failed (no reply) is not
    stored, so a later evaluation tries it again. `on_progress` receives the numbers of settled and of all
    ratings.
    """
    waiting = _places(judge, questions, ours, theirs, repeats, retries, both_orders)
    total, said = len(waiting), dict[_Place, Verdict | Failed]()
    identity = dict(judge.identity)
    for attempt in range(1 + (retries if judge.varies else 0)):
        cells: dict[str, list[_Place]] = {}  # equal pairs share a key and a verdict
        shown: dict[str, Shown] = {}
        for place in waiting:
            what = _shown(questions, ours, theirs, place)
            key = _key(identity, judge.rubric, what, place.repetition, attempt)
            kept = cache.get(key)
            if kept is not None:
                said[place] = _read(kept)
            else:
                cells.setdefault(key, []).append(place)
                shown[key] = what
        on_progress(len(said), total)
        with closing(judge.rate(shown)) as verdicts:
            for key, verdict in verdicts:
                if isinstance(verdict, Verdict):
                    cache.put(key, _record(identity, verdict))
                said |= dict.fromkeys(cells[key], verdict)
                on_progress(len(said), total)
        waiting = [p for p in waiting if isinstance(v := said[p], Verdict) and v.scores is None]
    ratings = [Rating(p.question, p.swapped, v) for p, v in said.items()]
    return summarise(judge.rubric, ratings, questions=len(questions), both_orders=both_orders)


def missing(
    judge: Judge,
    questions: Sequence[Example],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    cache: Cache,
    repeats: int = 1,
    retries: int = 2,
    both_orders: bool = True,
) -> list[Shown]:
    """The questions that `compare` would still ask the judge, without any retries of future replies."""
    out = {}
    identity = dict(judge.identity)
    for place in _places(judge, questions, ours, theirs, repeats, retries, both_orders):
        what = _shown(questions, ours, theirs, place)
        for attempt in range(1 + (retries if judge.varies else 0)):
            key = _key(identity, judge.rubric, what, place.repetition, attempt)
            kept = cache.get(key)
            if kept is None:
                out[key] = what
                break
            if _read(kept).scores is not None:
                break
    return list(out.values())


def _places(
    judge: Judge,
    questions: Sequence[Example],
    ours: Sequence[str],
    theirs: Sequence[str],
    repeats: int,
    retries: int,
    both_orders: bool,
) -> list[_Place]:
    """Both orders of a question side by side, so that a judge that batches sees them together."""
    if not len(questions) == len(ours) == len(theirs):
        raise ConfigError(
            f"Expected one answer of each side to each question; got {len(questions)} questions, "
            f"{len(ours)} of our answers and {len(theirs)} of the opponent's."
        )
    if repeats < 1 or retries < 0:
        raise ConfigError(f"Expected repeats >= 1 and retries >= 0; got {repeats} and {retries}.")
    if repeats > 1 and not judge.varies:
        raise ConfigError(
            f"Expected repeats = 1, since this judge always gives the same verdict; got {repeats}. "
            "A judge that samples (temperature above 0) can be repeated."
        )
    return [
        _Place(q, swapped, repetition)
        for q in range(len(questions))
        for repetition in range(repeats)
        for swapped in ((False, True) if both_orders else (False,))
    ]


def _shown(questions: Sequence[Example], ours: Sequence[str], theirs: Sequence[str], place: _Place) -> Shown:
    a, b = ours[place.question], theirs[place.question]
    return Shown(questions[place.question], *((b, a) if place.swapped else (a, b)))


def _key(identity: Mapping[str, Any], rubric: Rubric, shown: Shown, repetition: int, attempt: int) -> str:
    q = shown.question
    earlier = {"turns": [(turn.role, turn.text) for turn in q.turns]} if q.turns else {}
    return key_of(
        judge=identity,
        rubric=[rubric.name, rubric.version],
        instruction=q.instruction,
        context=q.context,
        reference=q.response,
        rule=q.rule,
        first=shown.first,
        second=shown.second,
        repetition=repetition,
        attempt=attempt,
        **earlier,
    )


def _record(identity: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    s = verdict.scores
    return {
        # Without the prompt, which is long, and part of the key.
        "judge": {name: value for name, value in identity.items() if name != "prompt"},
        "scores": None if s is None else [s.first, s.second],
        "reply": verdict.reply,
        "tokens": [verdict.prompt_tokens, verdict.reply_tokens],
    }


def _read(record: Mapping[str, Any]) -> Verdict:
    scores = record["scores"]
    return Verdict(
        None if scores is None else Scores(tuple(scores[0]), tuple(scores[1])),
        record["reply"],
        *record["tokens"],
    )
