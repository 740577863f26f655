"""A proportion and its exact interval."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from fedloom.errors import DataError


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
