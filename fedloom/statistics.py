"""Means, differences and proportions, each with its 95% interval.

A spread that rounding explains is not a finding. Intervals of means and differences are Student's t; those of
proportions and of bounded values hold at any number of records.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import DataError
from fedloom.rng import numpy_stream

# scipy is slow to import, and most users of this module compute no interval: it is imported where it is used.

ULPS = 8  # rounding allowed for each value, in units in the last place
ALPHA = 0.025  # error of each side of an interval
MOST = 0.75  # share of the wealth that a bet may lose

T = TypeVar("T")


def evenly(items: Sequence[T], count: int | None) -> list[T]:
    """`count` of the items at equal steps, or all: items sorted by group keep their mix."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def rounding(values: Sequence[float], *, magnitude: float = 0.0) -> float:
    """How far apart rounding may move equal values.

    `magnitude`: where the values are differences, the size of the numbers subtracted, if that is larger.
    """
    return ULPS * len(values) * sys.float_info.epsilon * max(magnitude, *map(abs, values))


def is_constant(values: Sequence[float], *, magnitude: float = 0.0) -> bool:
    """Whether these are two or more finite values that are equal up to rounding."""
    spread = max(values) - min(values)
    return len(values) > 1 and spread < float("inf") and spread <= rounding(values, magnitude=magnitude)


@dataclass(frozen=True)
class Mean:
    """`ci95` is Student's t interval; None for a single value."""

    mean: float
    ci95: tuple[float, float] | None
    constant: bool = False  # equal up to rounding: `ci95` is a point, which does not prove certainty


def mean(values: Sequence[float], *, magnitude: float = 0.0) -> Mean:
    """`magnitude` as in `rounding`. A spread that rounding explains counts as none."""
    if len(values) < 2:
        return Mean(fmean(values), None)
    nothing = rounding(values, magnitude=magnitude)
    return _around(fmean(values), _squared_error(values, magnitude), len(values) - 1, nothing)


def difference(a: Sequence[float], b: Sequence[float], *, magnitude: float = 0.0) -> Mean:
    """mean(a) - mean(b) of unpaired values whose spreads may differ (Welch 1947)."""
    middle = fmean(a) - fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Mean(middle, None)
    one, other = _squared_error(a, magnitude), _squared_error(b, magnitude)
    total = one + other
    # Without any spread the interval is a point, whatever the degrees of freedom.
    freedom = total**2 / (one**2 / (len(a) - 1) + other**2 / (len(b) - 1)) if total else 1.0
    return _around(middle, total, freedom, rounding([*a, *b], magnitude=magnitude))


def _squared_error(values: Sequence[float], magnitude: float) -> float:
    """The square of the mean's standard error."""
    return 0.0 if is_constant(values, magnitude=magnitude) else variance(values) / len(values)


def _around(middle: float, square: float, freedom: float, nothing: float) -> Mean:
    if not square:
        middle = 0.0 if abs(middle) <= nothing else middle
        return Mean(middle, (middle, middle), constant=True)
    from scipy import stats

    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(square)
    return Mean(middle, (middle - half, middle + half))


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval and its values: one per seed, say."""

    mean: float
    ci95: tuple[float, float] | None
    values: tuple[float, ...]
    constant: bool = False


def estimate(values: Sequence[float], *, magnitude: float = 0.0) -> Estimate:
    """`mean`, with the values kept."""
    found = mean(values, magnitude=magnitude)
    return Estimate(found.mean, found.ci95, tuple(values), found.constant)


@dataclass(frozen=True)
class Difference:
    """a - b over the same seeds.

    `p_value` is that of the two-sided paired t test. It is None where it is undefined: for one seed, and
    where the difference is the same for every seed up to rounding (`constant`), so that there is no spread to
    compare.
    """

    estimate: Estimate
    p_value: float | None

    @property
    def constant(self) -> bool:
        return self.estimate.constant


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a - b, paired by seed, which removes what both rows share: data, split and initial adapter."""
    apart = [x - y for x, y in zip(a, b, strict=True)]
    found = estimate(apart, magnitude=max(map(abs, (*a, *b))))
    if len(a) < 2 or found.constant:
        return Difference(found, None)
    from scipy import stats

    return Difference(found, float(stats.ttest_rel(a, b).pvalue))


@dataclass(frozen=True)
class Proportion:
    """`ci95` is Clopper-Pearson: it covers at least 95%, at any n, even if none or all are hits."""

    hits: int
    of: int
    value: float
    ci95: tuple[float, float]


def proportion(hits: int, of: int) -> Proportion:
    if not 0 <= hits <= of or of == 0:
        raise DataError(f"Expected from 0 to {of} hits of at least one trial, got {hits}.")
    from scipy import stats

    low = float(stats.beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return Proportion(hits, of, hits / of, (low, high))


def share(hits: int, of: int) -> Proportion | None:
    """The share of hits with its exact interval; None if `of` is 0."""
    return proportion(hits, of) if of else None


def bounded_mean(values: Sequence[float], *, low: float, high: float) -> tuple[float, float]:
    """Bounds of the mean of values that lie in [low, high]; each is wrong in at most 2.5% of draws, at any n.

    Student's interval misses rare events: from 50 records that a model does not recite, it concludes that
    none is ever recited. This one assumes no distribution. For n values that are all `low` it gives about
    3.7 / n of the range; for many values it comes close to Student's.

    Source: Waudby-Smith and Ramdas 2024, https://arxiv.org/abs/2010.09686, section 4.2: a bet against every
    mean, with stakes from the variance seen so far; a mean is refuted once the bet has won 40 times the
    stake.
    """
    if not low < high or not len(values):
        raise DataError(f"Expected values between two limits, got {len(values)} between {low} and {high}.")
    x = (np.asarray(values, float) - low) / (high - low)  # (n,)
    if not ((x >= -1e-9) & (x <= 1 + 1e-9)).all():
        raise DataError(f"Expected values from {low} to {high}, got {min(values)} to {max(values)}.")
    # In random order: canaries that were planted more often, say, may come last.
    x = numpy_stream(0, "attacks", "bounded mean").permutation(x.clip(0, 1))
    return low + (high - low) * (1 - _above(1 - x)), low + (high - low) * _above(x)


def _above(x: NDArray[np.float64]) -> float:
    """The largest mean of values in [0, 1] that is not refuted."""
    n, wanted = len(x), math.log(1 / ALPHA)
    count = np.arange(1, n + 1)
    middle = (0.5 + x.cumsum()) / (count + 1)
    spread = (0.25 + ((x - middle) ** 2).cumsum()) / (count + 1)
    before = np.concatenate([[0.25], spread[:-1]])  # a stake is set before its value is seen
    stakes = np.sqrt(2 * wanted / (n * before))

    def won(m: float) -> float:
        return float(np.log1p(np.minimum(stakes, MOST / (1 - m)) * (m - x)).sum()) - wanted

    from scipy.optimize import brentq

    end = 1 - 1e-12
    return 1.0 if won(end) <= 0 else max(float(x.mean()), float(brentq(won, 0.0, end)))
