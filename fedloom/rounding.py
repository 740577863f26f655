"""Which spreads and differences are rounding of floating-point numbers, and so no finding."""

from __future__ import annotations

import sys
from collections.abc import Sequence

ULPS = 8  # units in the last place that a value may be off, for each of the values


def rounding(values: Sequence[float], *, magnitude: float = 0.0) -> float:
    """How far equal values may lie apart. `magnitude`: of the numbers they are differences of, where those are larger."""
    return ULPS * len(values) * sys.float_info.epsilon * max(magnitude, *map(abs, values))


def is_constant(values: Sequence[float], *, magnitude: float = 0.0) -> bool:
    """Two or more finite values that are equal but for rounding."""
    spread = max(values) - min(values)
    return len(values) > 1 and spread < float("inf") and spread <= rounding(values, magnitude=magnitude)
