"""Intervals that hold at any number of records: of a proportion, and of a mean of bounded values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from fedloom.errors import DataError
from fedloom.rng import numpy_stream

ALPHA = 0.025  # of each side
MOST = 0.75  # of what a bet may lose


@dataclass(frozen=True)
class Proportion:
    """`ci95` is Clopper-Pearson: it covers at least 95%, at any n, also where no hit or every one was seen."""

    hits: int
    of: int
    value: float
    ci95: tuple[float, float]


def proportion(hits: int, of: int) -> Proportion:
    if not 0 <= hits <= of or of == 0:
        raise DataError(f"Expected from 0 to {of} hits of at least one trial, got {hits}.")
    low = float(stats.beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return Proportion(hits, of, hits / of, (low, high))


def bounded_mean(values: Sequence[float], *, low: float, high: float) -> tuple[float, float]:
    """Bounds of the mean of values that lie in [low, high]; each is wrong in at most 2.5% of draws, at any n.

    Student's interval misses what is rare: of 50 records that a model does not recite it says that none is ever
    recited. This one assumes no law. Of n values that all are `low` it gives about 3.7 / n of the range; where
    there are many, it comes near Student's.

    Source: Waudby-Smith and Ramdas 2024, https://arxiv.org/abs/2010.09686, section 4.2: a bet against every
    mean, with stakes from the variance seen so far; refuted is what 40 times the stake was won against.
    """
    if not low < high or not len(values):
        raise DataError(f"Expected values between two limits, got {len(values)} between {low} and {high}.")
    x = (np.asarray(values, float) - low) / (high - low)  # (n,)
    if not ((x >= -1e-9) & (x <= 1 + 1e-9)).all():
        raise DataError(f"Expected values from {low} to {high}, got {min(values)} to {max(values)}.")
    # In an order drawn by lot: canaries that were planted oftener, say, may come last.
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

    end = 1 - 1e-12
    return 1.0 if won(end) <= 0 else max(float(x.mean()), float(brentq(won, 0.0, end)))
