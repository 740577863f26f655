"""Means over seeds with 95% confidence intervals, and paired differences between rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """`ci95` is Student's t interval over the values; None for a single value, which has none."""

    mean: float
    ci95: tuple[float, float] | None
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, tuple(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return Estimate(mean, (mean - half, mean + half), tuple(values))


@dataclass(frozen=True)
class Difference:
    """a - b over the same seeds. `p_value` is the two-sided paired t test; None where it is undefined."""

    estimate: Estimate
    p_value: float | None


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Pairing by seed removes what both rows share: the data, the split and the initial adapter."""
    found = estimate([x - y for x, y in zip(a, b, strict=True)])
    if len(a) < 2 or stdev(found.values) == 0:
        return Difference(found, None)
    return Difference(found, float(stats.ttest_rel(a, b).pvalue))
