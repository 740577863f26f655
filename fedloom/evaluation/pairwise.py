"""From ratings to a table: both orders averaged; win, tie or lose; and how uncertain that is.

FedPIT's rule: the overall score of each side is averaged over both orders (and over repeated ratings within
an order); the greater wins, equal is a tie. A question counts as judged if both orders have at least one
readable rating, since one order alone would carry the judge's preference for a position into the result.
FedIT's rule: the scores of each side are summed over the questions, and the sums divided. It judged in one
order, ours first (`both_orders=False`): this cannot separate a preference for a position from quality.

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

from fedloom.evaluation.verdicts import Failed, Rubric, Scores, Verdict, overall
from fedloom.rng import numpy_stream
from fedloom.statistics import Estimate, is_constant, paired, proportion

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
    share: float | None  # None if `of` is 0
    ci95: tuple[float, float] | None


def share(count: int, of: int) -> Share:
    if of == 0:
        return Share(count, of, None, None)
    found = proportion(count, of)
    return Share(count, of, found.value, found.ci95)


@dataclass(frozen=True)
class Pair:
    """One judged question. Scores are means over orders and repetitions.

    `orders_agree` and `position_bias` are None if only one order was asked.
    """

    question: int
    outcome: Outcome
    ours: float
    theirs: float
    orders_agree: bool | None
    position_bias: float | None  # first shown minus second, mean of both orders: quality cancels
    aspects: tuple[tuple[float, float], ...]  # (ours, theirs) for each


@dataclass(frozen=True)
class Comparison:
    """Our answers against an opponent's, by one judge. Outcomes are counted over judged questions."""

    rubric: str
    both_orders: bool
    questions: int
    judged: int
    win: Share
    tie: Share
    lose: Share
    win_or_tie: Share
    order_disagreement: Share | None  # each order alone gives a different outcome; None for one order
    position_bias: float | None  # mean over judged questions; None for one order or no questions
    difference: Estimate | None  # ours - theirs per question; Student's t interval
    totals: tuple[float, float]  # (ours, theirs) summed over judged questions
    relative: float | None  # their ratio; None if the scale has no meaningful zero or theirs is 0
    relative_ci95: tuple[float, float] | None  # percentiles of a bootstrap over questions
    aspects: Mapping[str, tuple[float, float]]  # mean of (ours, theirs)
    ratings: int  # expected number: questions x orders x repetitions
    unread: Mapping[str, int]  # ratings without scores, by reason
    pairs: tuple[Pair, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(
    rubric: Rubric, ratings: Sequence[Rating], *, questions: int, both_orders: bool = True, seed: int = 0
) -> Comparison:
    """The comparison from these ratings. Without `both_orders`, those of the swapped order are left out."""
    ratings = [r for r in ratings if both_orders or not r.swapped]
    of: dict[int, list[Rating]] = {q: [] for q in range(questions)}
    for rating in ratings:
        of[rating.question].append(rating)
    pairs = [pair for q, own in of.items() if (pair := _pair(q, own, both_orders)) is not None]
    outcomes = Counter(p.outcome for p in pairs)
    n = len(pairs)
    biases = [p.position_bias for p in pairs if p.position_bias is not None]
    ours, theirs = np.array([p.ours for p in pairs]), np.array([p.theirs for p in pairs])  # (n,)
    divides = rubric.low >= 0 and n > 0 and theirs.sum() > 0
    return Comparison(
        rubric=rubric.name,
        both_orders=both_orders,
        questions=questions,
        judged=n,
        win=share(outcomes["win"], n),
        tie=share(outcomes["tie"], n),
        lose=share(outcomes["lose"], n),
        win_or_tie=share(outcomes["win"] + outcomes["tie"], n),
        order_disagreement=share(sum(not p.orders_agree for p in pairs), n) if both_orders else None,
        position_bias=fmean(biases) if biases else None,
        difference=paired([p.ours for p in pairs], [p.theirs for p in pairs]).estimate if pairs else None,
        totals=(float(ours.sum()), float(theirs.sum())),
        relative=float(ours.sum() / theirs.sum()) if divides else None,
        relative_ci95=_ratio_interval(ours, theirs, seed) if divides and n > 1 else None,
        aspects={
            name: (fmean(p.aspects[a][0] for p in pairs), fmean(p.aspects[a][1] for p in pairs))
            for a, name in enumerate(rubric.aspects)
            if pairs
        },
        ratings=len(ratings),
        unread=dict(
            Counter(_why(r.said) for r in ratings if isinstance(r.said, Failed) or r.said.scores is None)
        ),
        pairs=tuple(pairs),
    )


def _pair(question: int, ratings: Sequence[Rating], both_orders: bool) -> Pair | None:
    """The question's result; None unless every order that was asked has a rating."""
    orders = [
        [
            r.said.scores.swapped() if swapped else r.said.scores
            for r in ratings
            if r.swapped is swapped and isinstance(r.said, Verdict) and r.said.scores is not None
        ]
        for swapped in ((False, True) if both_orders else (False,))
    ]
    if not all(orders):
        return None
    sides = [_sides(one) for one in orders]  # (ours, theirs), a mean for each order
    ours, theirs = (sum(side, Fraction()) / len(orders) for side in zip(*sides, strict=True))
    agree = bias = None
    if both_orders:
        ahead, behind = (mine - other for mine, other in sides)  # of ours: shown first, then second
        agree, bias = _outcome(*sides[0]) == _outcome(*sides[1]), float((ahead - behind) / 2)
    return Pair(
        question,
        _outcome(ours, theirs),
        float(ours),
        float(theirs),
        agree,
        bias,
        tuple(
            (
                fmean(fmean(s.first[a] for s in one) for one in orders),
                fmean(fmean(s.second[a] for s in one) for one in orders),
            )
            for a in range(len(orders[0][0].first))
        ),
    )


def _sides(scores: Sequence[Scores]) -> tuple[Fraction, Fraction]:
    """(ours, theirs): mean overall score over repetitions, exact."""
    total = [
        sum((overall(side) for side in sides), Fraction())
        for sides in zip(*((s.first, s.second) for s in scores), strict=True)
    ]
    return total[0] / len(scores), total[1] / len(scores)


def _outcome(ours: Fraction, theirs: Fraction) -> Outcome:
    return "win" if ours > theirs else "tie" if ours == theirs else "lose"


def _why(said: Verdict | Failed) -> str:
    return said.reason if isinstance(said, Failed) else MALFORMED


def _ratio_interval(ours: np.ndarray, theirs: np.ndarray, seed: int) -> tuple[float, float] | None:
    drawn = numpy_stream(seed, "judge", "bootstrap").integers(len(ours), size=(DRAWS, len(ours)))
    below = theirs[drawn].sum(axis=1)  # (DRAWS,)
    if (below == 0).any():  # no ratio in a resample where the opponent scores nothing
        return None
    ratios = ours[drawn].sum(axis=1) / below
    if is_constant(ratios.tolist()):  # one ratio for every question
        low = high = ours.sum() / theirs.sum()
    else:
        low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
