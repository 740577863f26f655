"""Means with 95% confidence intervals, paired differences, and which spreads are rounding and so no finding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

ULPS = 8  # units in the last place that a value may be off, for each of the values


def rounding(values: Sequence[float], *, magnitude: float = 0.0) -> float:
    """How far equal values may lie apart. `magnitude`: of the numbers they are differences of, where those are larger."""
    return ULPS * len(values) * sys.float_info.epsilon * max(magnitude, *map(abs, values))


def is_constant(values: Sequence[float], *, magnitude: float = 0.0) -> bool:
    """Two or more finite values that are equal but for rounding."""
    spread = max(values) - min(values)
    return len(values) > 1 and spread < float("inf") and spread <= rounding(values, magnitude=magnitude)


@dataclass(frozen=True)
class Estimate:
    """`ci95` is Student's t interval over the values; None for a single value, which has none."""

    mean: float
    ci95: tuple[float, float] | None
    values: tuple[float, ...]
    constant: bool = False  # equal but for rounding: `ci95` is a point, which is no proof of certainty


def estimate(values: Sequence[float], *, magnitude: float = 0.0) -> Estimate:
    """`magnitude`: of the numbers that the values are differences of. A spread that their rounding explains is none."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, tuple(values))
    if is_constant(values, magnitude=magnitude):
        mean = 0.0 if abs(mean) <= rounding(values, magnitude=magnitude) else mean
        return Estimate(mean, (mean, mean), tuple(values), constant=True)
    from scipy import stats  # takes a while to import, and few who import this module compute intervals

    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return Estimate(mean, (mean - half, mean + half), tuple(values))


@dataclass(frozen=True)
class Difference:
    """a - b over the same seeds.

    `p_value` is the two-sided paired t test. It is None where it is undefined: of one seed, and where the
    difference is the same for every seed but for rounding (`constant`), which leaves nothing to compare it with.
    """

    estimate: Estimate
    p_value: float | None

    @property
    def constant(self) -> bool:
        return self.estimate.constant


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Pairing by seed removes what both rows share: the data, the split and the initial adapter."""
    apart = [x - y for x, y in zip(a, b, strict=True)]
    found = estimate(apart, magnitude=max(map(abs, (*a, *b))))
    if len(a) < 2 or found.constant:
        return Difference(found, None)
    from scipy import stats

    return Difference(found, float(stats.ttest_rel(a, b).pvalue))
