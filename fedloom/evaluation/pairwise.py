"""From ratings to a table: both orders averaged, win, tie or lose, and what is uncertain about it.

FedPIT's rule: the overall score of each side is averaged over both orders (and over repeated ratings
within an order); the greater wins, equal is a tie. A question counts as judged when both orders have at
least one readable rating, since one order alone would carry the judge's liking for a position into the
result. FedIT's: the scores of each side are summed over the questions, and the sums divided.

Intervals are over the questions, for these two sets of answers. They say nothing about training again
with another seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from fedloom.evaluation.statistics import Estimate, estimate
from fedloom.evaluation.verdicts import Failed, Rubric, Scores, Verdict, overall
from fedloom.rng import numpy_stream

Outcome = Literal["win", "tie", "lose"]
DRAWS = 2000  # bootstrap resamples of the questions
MALFORMED = "malformed reply"


@dataclass(frozen=True)
class Rating:
    question: int
    swapped: bool  # the opponent's answer was shown first
    said: Verdict | Failed  # the last attempt


@dataclass(frozen=True)
class Share:
    """`count` of `of`, with the exact (Clopper-Pearson) 95% interval of the share."""

    count: int
    of: int
    share: float | None  # None of nothing
    ci95: tuple[float, float] | None


def share(count: int, of: int) -> Share:
    if of == 0:
        return Share(count, of, None, None)
    ci = binomtest(count, of).proportion_ci(0.95, method="exact")
    return Share(count, of, count / of, (float(ci.low), float(ci.high)))


@dataclass(frozen=True)
class Pair:
    """One judged question. Scores are means over orders and repetitions."""

    question: int
    outcome: Outcome
    ours: float
    theirs: float
    orders_agree: bool
    aspects: tuple[tuple[float, float], ...]  # (ours, theirs) for each


@dataclass(frozen=True)
class Comparison:
    """Our answers against an opponent's, as one judge sees them. All counts of outcomes are of judged questions."""

    rubric: str
    questions: int
    judged: int
    win: Share
    tie: Share
    lose: Share
    win_or_tie: Share
    order_disagreement: Share  # the two orders, each alone, give different outcomes
    position_bias: float | None  # mean score of the answer shown first minus that of the second
    difference: Estimate | None  # ours - theirs a question; Student's t interval
    totals: tuple[float, float]  # (ours, theirs) summed over judged questions
    relative: float | None  # their ratio; None where the scale has no meaningful zero or theirs is 0
    relative_ci95: tuple[float, float] | None  # percentiles of a bootstrap over questions
    aspects: Mapping[str, tuple[float, float]]  # mean of (ours, theirs)
    ratings: int  # that should be: questions x orders x repetitions
    unread: Mapping[str, int]  # ratings without scores, by reason
    pairs: tuple[Pair, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(rubric: Rubric, ratings: Sequence[Rating], *, questions: int, seed: int = 0) -> Comparison:
    of: dict[int, list[Rating]] = {q: [] for q in range(questions)}
    for rating in ratings:
        of[rating.question].append(rating)
    pairs = [pair for q, own in of.items() if (pair := _pair(q, own)) is not None]
    outcomes = Counter(p.outcome for p in pairs)
    n = len(pairs)
    scored = [r.said.scores for r in ratings if isinstance(r.said, Verdict) and r.said.scores is not None]
    ours, theirs = np.array([p.ours for p in pairs]), np.array([p.theirs for p in pairs])  # (n,)
    divides = rubric.low >= 0 and n > 0 and theirs.sum() > 0
    return Comparison(
        rubric=rubric.name,
        questions=questions,
        judged=n,
        win=share(outcomes["win"], n),
        tie=share(outcomes["tie"], n),
        lose=share(outcomes["lose"], n),
        win_or_tie=share(outcomes["win"] + outcomes["tie"], n),
        order_disagreement=share(sum(not p.orders_agree for p in pairs), n),
        position_bias=fmean(float(overall(s.first) - overall(s.second)) for s in scored) if scored else None,
        difference=estimate([p.ours - p.theirs for p in pairs]) if pairs else None,
        totals=(float(ours.sum()), float(theirs.sum())),
        relative=float(ours.sum() / theirs.sum()) if divides else None,
        relative_ci95=_ratio_interval(ours, theirs, seed) if divides and n > 1 else None,
        aspects={
            name: (fmean(p.aspects[a][0] for p in pairs), fmean(p.aspects[a][1] for p in pairs))
            for a, name in enumerate(rubric.aspects)
            if pairs
        },
        ratings=len(ratings),
        unread=dict(Counter(_why(r.said) for r in ratings if isinstance(r.said, Failed) or r.said.scores is None)),
        pairs=tuple(pairs),
    )


def _pair(question: int, ratings: Sequence[Rating]) -> Pair | None:
    """None unless both orders were rated."""
    as_is, swapped = (
        [
            r.said.scores.swapped() if order else r.said.scores
            for r in ratings
            if r.swapped is order and isinstance(r.said, Verdict) and r.said.scores is not None
        ]
        for order in (False, True)
    )
    if not as_is or not swapped:
        return None
    ours, theirs = zip(*(_sides(one) for one in (as_is, swapped)), strict=True)  # a mean for each order
    mine, other = sum(ours, Fraction()) / 2, sum(theirs, Fraction()) / 2
    return Pair(
        question,
        _outcome(mine, other),
        float(mine),
        float(other),
        _outcome(ours[0], theirs[0]) == _outcome(ours[1], theirs[1]),
        tuple(
            (
                fmean(fmean(s.first[a] for s in one) for one in (as_is, swapped)),
                fmean(fmean(s.second[a] for s in one) for one in (as_is, swapped)),
            )
            for a in range(len(as_is[0].first))
        ),
    )


def _sides(scores: Sequence[Scores]) -> tuple[Fraction, Fraction]:
    """(ours, theirs): mean overall score over repetitions, exact."""
    total = [sum((overall(side) for side in sides), Fraction()) for sides in zip(*((s.first, s.second) for s in scores), strict=True)]
    return total[0] / len(scores), total[1] / len(scores)


def _outcome(ours: Fraction, theirs: Fraction) -> Outcome:
    return "win" if ours > theirs else "tie" if ours == theirs else "lose"


def _why(said: Verdict | Failed) -> str:
    return said.reason if isinstance(said, Failed) else MALFORMED


def _ratio_interval(ours: np.ndarray, theirs: np.ndarray, seed: int) -> tuple[float, float] | None:
    drawn = numpy_stream(seed, "judge", "bootstrap").integers(len(ours), size=(DRAWS, len(ours)))
    below = theirs[drawn].sum(axis=1)  # (DRAWS,)
    if (below == 0).any():  # a resample in which the opponent scores nothing has no ratio
        return None
    low, high = np.quantile(ours[drawn].sum(axis=1) / below, [0.025, 0.975])
    return float(low), float(high)
