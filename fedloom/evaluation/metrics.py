"""Which direction of a metric is better, and which metrics measure leakage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

LEAKS = ("exposure", "extraction", "auc")  # the first one measured is shown beside quality
LOWER = ("loss", "end_loss", *LEAKS)  # less is better; for an AUC, less distance from 1/2
COIN = 0.5  # the AUC of a coin


def better(metric: str, a: float, b: float) -> bool:
    """Is `a` the better value? Loss and leakage are better when lower, every other metric when higher."""
    return improves(metric, judged(metric, a) - judged(metric, b))


def judged(metric: str, x: float) -> float:
    """The part of a value that counts. An AUC below 1/2 tells as much as one above: reverse the score."""
    return abs(x - COIN) if metric == "auc" else x


def improves(metric: str, gap: float) -> bool:
    """Is this difference of judged values an improvement?"""
    return gap < 0 if metric in LOWER else gap > 0


def best(metric: str, values: Sequence[float]) -> float:
    return (min if metric in LOWER else max)(values, key=partial(judged, metric))
