"""Means over seeds with 95% confidence intervals, and paired differences between rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from fedloom.rounding import is_constant, rounding


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
    return Difference(found, float(stats.ttest_rel(a, b).pvalue))
