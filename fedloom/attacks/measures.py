"""What extraction reports: shares and means with their intervals, always beside the untuned base.

All intervals are 95% and over records: they say what other records of the same kind would have shown, not
what another training run would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy import stats

from fedloom.attacks.intervals import Proportion, proportion
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.statistics import is_constant, rounding

BASE = "base"  # the row of the untuned base, which every attack is mounted on too


def with_base(adapters: Mapping[str, AdapterState | None]) -> dict[str, AdapterState | None]:
    """The models to attack, the untuned base first."""
    if adapters.get(BASE) is not None:
        raise ConfigError(
            f"Row {BASE!r} is the untuned base, got an adapter of that name; call it otherwise."
        )
    return {BASE: None, **adapters}


def share(hits: int, of: int) -> Proportion | None:
    """With its exact interval; None of nothing, which has none."""
    return proportion(hits, of) if of else None


@dataclass(frozen=True)
class Mean:
    """`ci95` is Student's t interval; None of a single value, which has none."""

    mean: float
    ci95: tuple[float, float] | None
    constant: bool = (
        False  # the values are equal but for rounding: `ci95` is a point, which is no proof of certainty
    )


def mean(values: Sequence[float], *, magnitude: float = 0.0) -> Mean:
    """`magnitude`: of the numbers that the values are differences of. A spread that their rounding explains is none."""
    if len(values) < 2:
        return Mean(fmean(values), None)
    return _around(
        fmean(values), _square(values, magnitude), len(values) - 1, rounding(values, magnitude=magnitude)
    )


def difference(a: Sequence[float], b: Sequence[float], *, magnitude: float = 0.0) -> Mean:
    """mean(a) - mean(b) of unpaired values whose spreads may differ (Welch 1947)."""
    middle = fmean(a) - fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Mean(middle, None)
    one, other = _square(a, magnitude), _square(b, magnitude)
    total = one + other
    # Without any spread the interval is a point, whatever the degrees of freedom.
    freedom = total**2 / (one**2 / (len(a) - 1) + other**2 / (len(b) - 1)) if total else 1.0
    return _around(middle, total, freedom, rounding([*a, *b], magnitude=magnitude))


def _square(values: Sequence[float], magnitude: float) -> float:
    """Of the mean's standard error."""
    return 0.0 if is_constant(values, magnitude=magnitude) else variance(values) / len(values)


def _around(middle: float, square: float, freedom: float, nothing: float) -> Mean:
    if not square:
        middle = 0.0 if abs(middle) <= nothing else middle
        return Mean(middle, (middle, middle), constant=True)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(square)
    return Mean(middle, (middle - half, middle + half))
