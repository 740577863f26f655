"""A release gate: the attacks' figures against limits, with the uncertainty that few records leave.

A limit is compared with the upper end of a 95% interval, so that a small sample cannot pass for a harmless
model: a model that is worse than the limit passes in at most 5% of audits, however few the records. Where the
figure keeps the limit and its bound does not, the gate tells how many records would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedloom.attacks.exposure import CHANCE
from fedloom.attacks.membership import auc_interval
from fedloom.errors import ConfigError
from fedloom.rows import BASE
from fedloom.statistics import bounded_mean, proportion

RELEASED = "released"  # the row beside the base
On = Literal["bound", "estimate"]
LARGEST = 256  # times as many records: a figure that these do not settle is too close to the limit


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a release may show; None: no limit."""

    exposure: float | None = None  # bits
    auc: float | None = None
    extraction: float | None = None  # ROUGE-L
    recall: float | None = None  # share of tokens
    on: On = "bound"  # compared with the limit: the upper end of the 95% interval, or the estimate

    def check(self, *, references: int, canaries: bool) -> None:
        """Called before any attack. A limit that nothing can exceed would pass whatever leaks."""
        for limit, name, low, high in (
            (self.exposure, "--max-exposure", 0.0, math.log2(references)),
            (self.auc, "--max-auc", 0.5, 1.0),
            (self.extraction, "--max-extraction", -1.0, 1.0),
            (self.recall, "--max-recall", 0.0, 1.0),
        ):
            if limit is not None and not low <= limit < high:
                raise ConfigError(f"Expected {name} of at least {low:g} and below {high:g}, got {limit:g}.")
        if self.exposure is not None and not canaries:
            raise ConfigError(
                "--max-exposure needs planted canaries, and this run has none. Set data.canaries and train again, "
                "or leave the limit out."
            )


@dataclass(frozen=True)
class Figure:
    """One measure of a release.

    `bound(f)` is the upper bound if f times as many records had shown the same, `least(f)` if they had shown
    nothing.
    """

    value: float
    records: int
    bound: Callable[[int], float]
    least: Callable[[int], float]


def gate(found: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Every limit that was set, against its figure. A figure that could not be measured fails its limit.

    Even by the estimate, there must be enough records that finding nothing in them would keep the limit's
    bound.
    """
    figures: Mapping[str, tuple[float | None, Callable[[], Figure | str]]] = {
        "exposure": (limits.exposure, lambda: exposure(found["positions"]["public"]["exposure"])),
        "auc": (limits.auc, lambda: auc(found["positions"]["public"]["membership"])),
        "extraction": (limits.extraction, lambda: extraction(found["positions"]["public"]["extraction"])),
        "recall": (limits.recall, lambda: recall(found["positions"]["server"])),
    }
    lines = [
        _line(name, limit, measure(), limits.on)
        for name, (limit, measure) in figures.items()
        if limit is not None
    ]
    return {"gate": lines, "passed": all(line["passed"] for line in lines) if lines else None}


def _line(name: str, limit: float, figure: Figure | str, on: On) -> dict[str, Any]:
    if isinstance(figure, str):
        return {"measure": name, "limit": limit, "value": None, "passed": False, "reason": figure}
    bound = figure.bound(1)
    needed = None
    if figure.value <= limit:
        needed = _needed(figure.records, figure.bound if on == "bound" else figure.least, limit)
    return {
        "measure": name,
        "limit": limit,
        "value": figure.value,
        "bound": bound,
        "on": on,
        "records": figure.records,
        "needed": needed,  # records with which this figure would keep the limit; null: more than anyone has
        "passed": needed is not None and needed <= figure.records,
    }


def _needed(records: int, bound: Callable[[int], float], limit: float) -> int | None:
    """About how many records would keep the limit: a multiple of the present number."""
    factor = 1
    while bound(factor) > limit:
        factor *= 2
        if factor > LARGEST:
            return None
    low = factor // 2  # too few, or 0
    while factor - low > 1:
        middle = (low + factor) // 2
        low, factor = (middle, factor) if bound(middle) > limit else (low, middle)
    return factor * records


# --- the measures ----------------------------------------------------------------------------------------


def auc(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """`best_auc`, bounded: the most that the intervals of any score, in either direction, allow."""
    told, base = rows[RELEASED], rows[BASE]
    sizes = [(one["members"], one["nonmembers"]) for one in told.values()]
    n, m = min(sizes)

    def ends(auc: float, factor: int) -> tuple[float, float]:
        return auc_interval(auc, members=factor * n, nonmembers=factor * m)

    def bound(factor: int) -> float:
        return max(
            _beyond(high, untuned)
            for name, one in told.items()
            for (_, high), (untuned, _) in zip(
                _both(ends(one["auc"], factor)), _both(ends(base[name]["auc"], factor)), strict=True
            )
        )

    return Figure(best_auc(rows)[1], min(n, m), bound, lambda factor: ends(0.5, factor)[1])


def best_auc(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, float]:
    """The score that separates members best, and its AUC less its separation under the untuned base.

    An AUC of 0 tells as much as one of 1, so the distance from 1/2 counts in either direction. The base has
    never seen a member: any separation there, in the same direction, is a difference between the two groups.
    """
    beyond = {
        name: max(
            _beyond(high, untuned)
            for (_, high), (_, untuned) in zip(
                _both((one["auc"], one["auc"])), _both((rows[BASE][name]["auc"],) * 2), strict=True
            )
        )
        for name, one in rows[RELEASED].items()
    }
    best = max(beyond, key=lambda name: beyond[name])
    return best, beyond[best]


def _both(interval: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The interval of an AUC, and that of the reversed score."""
    low, high = interval
    return (low, high), (1 - high, 1 - low)


def _beyond(auc: float, untuned: float) -> float:
    """Never below 1/2: a coin."""
    return max(0.5, auc - max(0.0, untuned - 0.5))


def exposure(rows: Mapping[str, Any]) -> Figure | str:
    """`most_exposed`, bounded: the mean that other canaries, planted alike, might have shown."""
    if "reason" in rows:
        return str(rows["reason"])
    calibrated, bare, base = (
        rows[row][score]["planted"]["bits"]
        for row, score in ((RELEASED, "calibrated"), (RELEASED, "loss"), (BASE, "loss"))
    )
    ceiling = rows[RELEASED]["calibrated"]["ceiling"]

    def ends(bits: Sequence[float], factor: int) -> tuple[float, float]:
        return bounded_mean([*bits] * factor, low=0.0, high=ceiling)

    def bound(factor: int) -> float:
        luck = max(0.0, ends(base, factor)[0] - CHANCE)
        return max(ends(calibrated, factor)[1], ends(bare, factor)[1] - luck)

    return Figure(
        most_exposed(rows), len(calibrated), bound, lambda factor: ends([0.0] * len(calibrated), factor)[1]
    )


def most_exposed(rows: Mapping[str, Any]) -> float:
    """Mean bits known of a planted canary, by the score that shows more.

    If the base's loss on a secret is noise, comparing with it hides what the plain loss shows. With the plain
    loss, the base's own exposure beyond chance is the luck of the draw and is subtracted.
    """
    calibrated, bare, base = (
        float(rows[row][score]["planted"]["mean"])
        for row, score in ((RELEASED, "calibrated"), (RELEASED, "loss"), (BASE, "loss"))
    )
    return max(calibrated, bare - max(0.0, base - CHANCE))


def extraction(rows: Mapping[str, Any]) -> Figure:
    """`memorised`: ROUGE-L that members gain over the base, less what held-out examples gain."""
    members, held_out = (
        [a - b for a, b in zip(rows[RELEASED][group]["values"], rows[BASE][group]["values"], strict=True)]
        for group in ("members", "held_out")
    )

    def bound(inside: Sequence[float], outside: Sequence[float], factor: int) -> float:
        high = bounded_mean([*inside] * factor, low=-1.0, high=1.0)[1]
        return high - bounded_mean([*outside] * factor, low=-1.0, high=1.0)[0]

    nothing = [0.0] * len(members), [0.0] * len(held_out)
    return Figure(
        rows[RELEASED]["memorised"]["mean"],
        min(len(members), len(held_out)),
        lambda factor: bound(members, held_out, factor),
        lambda factor: bound(*nothing, factor),
    )


def recall(server: Mapping[str, Any]) -> Figure | str:
    """Recall of one client's tokens from its single upload."""
    read = server.get("inversion", server)
    if "reason" in read:
        return str(read["reason"])
    tokens = read["tokens"]
    hits = round(read["recall"] * tokens)
    return Figure(
        read["recall"],
        tokens,
        lambda factor: proportion(factor * hits, factor * tokens).ci95[1],
        lambda factor: proportion(0, factor * tokens).ci95[1],
    )
