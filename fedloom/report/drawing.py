"""The common parts of all figures. They are transparent and set no ink colour: the page has light and dark.

Names come from data, so they are escaped (Plotly interprets a few HTML tags in texts) and never used as
axis values: two long names that look alike when shortened stay distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

FAINT = "rgba(128,128,128,0.14)"
SHOWN_CLIENTS = 400  # more would be thinner than a pixel; of more, these are chosen evenly
ROW_BY_ROW = 24  # up to this number, every client gets a line with its name


def figure(traces: Sequence[Any], *, height: int, **layout: Any) -> go.Figure:
    axis = {
        "gridcolor": "rgba(128,128,128,0.18)",
        "linecolor": "rgba(128,128,128,0.35)",
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
    }
    layout["xaxis"], layout["yaxis"] = (
        {**axis, **layout.get("xaxis", {})},
        {**axis, **layout.get("yaxis", {})},
    )
    settings = {
        "template": go.layout.Template(),
        "height": height,
        "autosize": True,
        "dragmode": False,
        "showlegend": None,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 10, "r": 16, "t": 16, "b": 44},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
            "traceorder": "normal",
        },
        **layout,
    }
    return go.Figure(traces, settings)


def within(metric: str) -> dict[str, Any]:
    """The range of an axis of shares; an interval over two seeds may reach far beyond it."""
    limits = {"loss": {}, "exposure": {"clipmin": 0}, "auc": {"clipmin": 0, "clipmax": 1}}
    return {"autorangeoptions": limits.get(metric, {"clipmin": -3, "clipmax": 103})}


def axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}}


def ticks(names: Sequence[str], *, longest: int = 28, every: bool = False) -> dict[str, Any]:
    """Names at 0, 1, 2, ...; an evenly spaced selection where there are too many to read."""
    nth = 1 if every or len(names) <= ROW_BY_ROW else -(-len(names) // 12)
    shown = list(range(0, len(names), nth))
    return {"tickvals": shown, "ticktext": [label(names[i], longest) for i in shown]}


def rounds_axis(last: int) -> dict[str, Any]:
    return {"title": axis_title("round"), "dtick": step(last)}


def step(rounds: int) -> int:
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if rounds <= 12 * s)


def label(name: str, longest: int = 60) -> str:
    name = " ".join(name.split()) or "(none)"
    return escape(name if len(name) <= longest else name[: longest - 1] + "…")
