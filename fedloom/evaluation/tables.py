"""The two papers' tables, from pairwise comparisons over seeds.

FedIT's (arXiv 2305.05644): the summed scores of a baseline and of the federated model, and their ratio.
FedPIT's (arXiv 2403.06131): how often a method's answers win, tie and lose against stored ones. Neither paper
has intervals; both tables here do. A seed has one comparison, or one per client if every client has its own
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from fedloom.evaluation.pairwise import DRAWS, Comparison, share
from fedloom.rng import numpy_stream
from fedloom.statistics import Estimate, estimate


@dataclass(frozen=True)
class Relative:
    """A baseline beside the federated model, whose answers are `theirs` in every comparison."""

    scores: tuple[float, float]  # (baseline, federated), summed over questions, mean over seeds
    ratio: float | None  # federated / baseline; None if the scale has no zero or the baseline scores nothing
    # Percentiles of a bootstrap over questions and seeds; (low, None): no upper bound.
    ci95: tuple[float, float | None] | None
    difference: Estimate  # federated - baseline per judged question; over seeds, or one seed's questions
    categories: Mapping[str, float | None]  # the ratio within each category of questions


def relative(
    comparisons: Sequence[Comparison], categories: Sequence[Sequence[str]], *, divides: bool, crossed: bool
) -> Relative:
    """One comparison per seed, and the category of each of its questions.

    `crossed` says that all seeds have the same questions: seeds and questions are then each resampled as a
    whole; otherwise each seed's questions are resampled within it. With few seeds the interval is too narrow,
    like any bootstrap's. A scale that starts below zero has no ratio: `divides` is False.
    """
    tables = [_scores(c) for c in comparisons]  # per seed: (questions, 2), NaN if not judged
    total = np.sum([np.nansum(t, axis=0) for t in tables], axis=0)  # (2,)
    names = sorted({name for of_seed in categories for name in of_seed})
    parts = {
        name: np.sum(
            [
                np.nansum(t[[c == name for c in its]], axis=0)
                for t, its in zip(tables, categories, strict=True)
            ],
            axis=0,
        )
        for name in names
    }
    return Relative(
        (float(total[0]) / len(tables), float(total[1]) / len(tables)),
        _ratio(total) if divides else None,
        _interval(tables, crossed=crossed) if divides else None,
        _difference(tables),
        {name: _ratio(part) if divides else None for name, part in parts.items()},
    )


@dataclass(frozen=True)
class Wins:
    """Shares of judged questions, mean over seeds.

    `ci95` is Student's t over seeds; for one seed, it is exact over questions.
    """

    win: Estimate
    tie: Estimate
    lose: Estimate
    win_or_tie: Estimate
    categories: Mapping[str, float | None]  # share won or tied in each category of questions, over all seeds


def wins(comparisons: Sequence[Sequence[Comparison]], categories: Sequence[Sequence[str]]) -> Wins | None:
    """From each seed's comparisons and its questions' categories. None if a seed has no judged question."""
    if not all(sum(c.judged for c in its) for its in comparisons):
        return None
    names = sorted({name for of_seed in categories for name in of_seed})
    kept: dict[str, list[bool]] = {name: [] for name in names}
    for its, of_seed in zip(comparisons, categories, strict=True):
        for c in its:
            for pair in c.pairs:
                kept[of_seed[pair.question]].append(pair.outcome != "lose")
    return Wins(
        _share(comparisons, "win"),
        _share(comparisons, "tie"),
        _share(comparisons, "lose"),
        _share(comparisons, "win_or_tie"),
        {name: fmean(found) if found else None for name, found in kept.items()},
    )


def _share(comparisons: Sequence[Sequence[Comparison]], outcome: str) -> Estimate:
    counts = [
        (sum(getattr(c, outcome).count for c in its), sum(c.judged for c in its)) for its in comparisons
    ]
    values = [count / of for count, of in counts]
    if len(values) > 1:
        return estimate(values)
    return Estimate(values[0], share(*counts[0]).ci95, tuple(values))


def _scores(comparison: Comparison) -> np.ndarray:
    table = np.full((comparison.questions, 2), np.nan)  # (questions, 2)
    for pair in comparison.pairs:
        table[pair.question] = pair.ours, pair.theirs
    return table


def _ratio(total: np.ndarray) -> float | None:
    return float(total[1] / total[0]) if total[0] > 0 else None


def _difference(tables: Sequence[np.ndarray]) -> Estimate:
    # Per seed: its judged questions.
    apart = [found[np.isfinite(found)] for found in (t[:, 1] - t[:, 0] for t in tables)]
    means = [float(a.mean()) for a in apart if len(a)]
    return estimate(means if len(means) > 1 else [float(x) for x in apart[0]] or [0.0])


def _interval(tables: Sequence[np.ndarray], *, crossed: bool) -> tuple[float, float | None] | None:
    if sum(int(np.isfinite(t[:, 0]).sum()) for t in tables) < 2:
        return None
    rng = numpy_stream(0, "tables", "bootstrap")
    totals = np.zeros((DRAWS, 2))
    for draw in range(DRAWS):
        questions = rng.integers(len(tables[0]), size=len(tables[0]))  # (questions,)
        for s in rng.integers(len(tables), size=len(tables)):
            if not crossed:
                questions = rng.integers(len(tables[s]), size=len(tables[s]))
            totals[draw] += np.nansum(tables[s][questions], axis=0)
    baseline, federated = totals.T
    # If the baseline scores nothing in a resample, the ratio exceeds any number.
    ratios = np.divide(federated, baseline, out=np.full(DRAWS, np.inf), where=baseline > 0)
    low, high = (float(x) for x in np.quantile(ratios, [0.025, 0.975], method="inverted_cdf"))
    return None if low == np.inf else (low, None if high == np.inf else high)
