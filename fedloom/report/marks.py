"""How rows and groups are told apart: by colour, and by shape, dash or pattern for the colour-blind.

Every colour has a contrast of at least 3 to 1, on the light page and on the dark one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.rows import Row

ROW_COLOURS = {
    "base": "#8a919c",
    "local mean": "#be8926",
    "local best": "#c27a1a",
    "local_only": "#c27a1a",
    "federated": "#3b7dd8",
    "centralised": "#2a9d78",
}
# After Paul Tol's "muted" scheme, which is safe for colour-blind readers.
GROUP_COLOURS = (
    "#1f9cda",
    "#cc6677",
    "#a8932a",
    "#3f9a55",
    "#6f69c9",
    "#41a392",
    "#aa4499",
    "#8c6d4f",
    "#b0527c",
    "#8e949d",
)
# For methods: hues that none of the rows above has.
METHOD_COLOURS = ("#cc6677", "#6f69c9", "#1f9cda", "#979732", "#aa4499", "#8c6d4f", "#b0527c", "#8e949d")

ROW_SYMBOLS = {
    "base": "square",
    "local mean": "triangle-up",
    "local best": "triangle-down",
    "local_only": "diamond",
    "federated": "circle",
    "centralised": "star",
}
METHOD_SYMBOLS = (
    "pentagon",
    "cross",
    "x",
    "hexagram",
    "triangle-left",
    "triangle-right",
    "bowtie",
    "hourglass",
    "star-diamond",
)

ROW_DASHES = {"base": "dot", "local_only": "dash", "federated": "solid", "centralised": "longdash"}
METHOD_DASHES = ("dashdot", "2px,3px", "longdashdot", "8px,3px", "5px,2px", "12px,3px,2px,3px", "1px,2px")

PATTERNS = ("", "/", "\\", "x", "-", "|", "+", ".")


def colour(row: str, labels: Sequence[str] = ()) -> str:
    """A row's mark. `labels` are the compared methods in order; each shares its colour with its clients."""
    return _of(row, labels, ROW_COLOURS, METHOD_COLOURS)


def symbol(row: str, labels: Sequence[str] = ()) -> str:
    return _of(row, labels, ROW_SYMBOLS, METHOD_SYMBOLS)


def dash(row: str, labels: Sequence[str] = ()) -> str:
    return _of(row, labels, ROW_DASHES, METHOD_DASHES)


def _of(row: str, labels: Sequence[str], rows: Mapping[str, str], methods: Sequence[str]) -> str:
    if row in rows:
        return rows[row]
    method = Row.parse(row).label
    if method in labels:
        return methods[list(labels).index(method) % len(methods)]
    return rows.get("local_only" if method == "local" else method, methods[0])


def bar(hue: str, nth: int) -> dict[str, Any]:
    """The marker for the nth group's bars: any eight consecutive groups differ in pattern."""
    pattern = {"shape": PATTERNS[nth % len(PATTERNS)], "size": 7, "solidity": 0.25, "fillmode": "overlay"}
    return {
        "color": hue,
        "line": {"width": 0},
        "pattern": {**pattern, "fgcolor": "#ffffff", "fgopacity": 0.75},
    }
