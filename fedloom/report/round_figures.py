"""Figures by round: losses, who took part, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from fedloom.report.drawing import (
    FAINT,
    ROW_BY_ROW,
    SHOWN_CLIENTS,
    axis_title,
    figure,
    label,
    rounds_axis,
    step,
    ticks,
)
from fedloom.report.marks import ROW_COLOURS, colour, dash, symbol
from fedloom.report.rounds import Part, Record, What, base_loss, loss_curve, mean_curve, part
from fedloom.report.terms import byte_size, title
from fedloom.statistics import evenly


def loss_figure(
    journals: Mapping[str, Sequence[Sequence[Record]]],
    *,
    what: What,
    own: str | None = None,
    labels: Sequence[str] = (),
) -> go.Figure:
    """A loss by round: thin lines for the seeds, a thick line for their mean.

    `journals` is row -> seeds -> records. The horizontal line is the base model on the
    same held-out examples, averaged over seeds.
    """
    traces: list[Any] = []
    for row, seeds in journals.items():
        hue, name = colour(row, labels), label(curve_title(row, own))
        curves = [curve for records in seeds if (curve := loss_curve(records, what=what))]
        if len(curves) > 1:
            traces += [
                go.Scatter(
                    x=list(c),
                    y=list(c.values()),
                    mode="lines",
                    line={"color": hue, "width": 1},
                    opacity=0.35,
                    showlegend=False,
                    hoverinfo="skip",
                )
                for c in curves
            ]
        mean = mean_curve(curves)
        if mean:
            traces.append(
                go.Scatter(
                    x=list(mean),
                    y=list(mean.values()),
                    mode="lines+markers" if len(mean) <= 30 else "lines",
                    line={"color": hue, "width": 2.5, "dash": dash(row, labels)},
                    marker={"size": 7, "symbol": symbol(row, labels)},
                    name=name,
                    hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
                )
            )
    base = base_loss(journals) if what == "held_out" else None
    lines = (
        []
        if base is None
        else [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": base,
                "y1": base,
                "line": {"color": ROW_COLOURS["base"], "width": 1.5, "dash": "dot"},
            }
        ]
    )
    notes = (
        []
        if base is None
        else [
            {
                "xref": "paper",
                "x": 1,
                "y": base,
                "text": f"base {base:.3f}",
                "showarrow": False,
                "xanchor": "right",
                "yanchor": "bottom",
            }
        ]
    )
    return figure(
        traces,
        height=340,
        hovermode="x unified",
        shapes=lines,
        annotations=notes,
        showlegend=True,
        xaxis=_rounds(journals),
        yaxis={"title": axis_title("nats per token")},
    )


def curve_title(row: str, own: str | None = None) -> str:
    return {"local_only": "Local only, all clients"}.get(row, title(row, own))


PARTS: dict[Part, str] = {
    "not selected": FAINT,
    "took part": ROW_COLOURS["federated"],
    "refused": "#d0524a",
    "no answer": "#be8926",
}
SIGNS: dict[Part, str] = {"refused": "×", "no answer": "?"}  # shown in a cell where there is room


def participation_figure(clients: Sequence[str], records: Sequence[Record]) -> go.Figure:
    """Clients by rounds: who was selected, who answered, who was refused."""
    names, rounds = evenly(clients, SHOWN_CLIENTS), [r for r in records if r["round"] > 0]
    kinds = list(PARTS)
    cells = [[part(r, c) for r in rounds] for c in names]
    hover = [
        [
            f"{label(c)}, round {r['round']}: {kind}" + _reason(r, c)
            for r, kind in zip(rounds, line, strict=True)
        ]
        for c, line in zip(names, cells, strict=True)
    ]
    steps = [
        (edge, PARTS[kind]) for k, kind in enumerate(kinds) for edge in (k / len(kinds), (k + 1) / len(kinds))
    ]
    present = {kind for line in cells for kind in line}
    written = len(names) <= ROW_BY_ROW and len(rounds) <= ROW_BY_ROW  # otherwise cells are too small
    gap = 2 if len(names) <= ROW_BY_ROW else 1 if len(names) <= 120 else 0
    height = (22 * len(names) if len(names) <= ROW_BY_ROW else min(900, max(380, 7 * len(names)))) + 110
    grid = go.Heatmap(
        x=[r["round"] for r in rounds],
        y=list(range(len(names))),
        z=[[kinds.index(kind) for kind in line] for line in cells],
        zmin=-0.5,
        zmax=len(kinds) - 0.5,
        colorscale=steps,
        showscale=False,
        xgap=gap,
        ygap=gap,
        text=[[SIGNS.get(kind, "") for kind in line] for line in cells] if written else None,
        texttemplate="%{text}" if written else None,
        hovertext=hover,
        hoverinfo="text",
    )
    legend = [
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={
                "symbol": "square",
                "size": 11,
                "color": PARTS[kind],
                "line": {"width": 1, "color": "rgba(128,128,128,0.5)"},
            },
            name=f"{kind} {SIGNS.get(kind, '') if written else ''}".strip(),
        )
        for kind in kinds
        if kind in present
    ]
    across = {"title": axis_title("round"), "dtick": step(len(rounds)), "showgrid": False}
    return figure(
        [grid, *legend],
        height=height,
        xaxis=across,
        showlegend=True,
        hovermode="closest",
        yaxis={**ticks(names), "showgrid": False, "autorange": "reversed"},
    )


def _reason(record: Record, client: str) -> str:
    return f" ({label(str(record['refused'][client]))})" if client in record["refused"] else ""


def bytes_figure(rounds: Sequence[Record]) -> go.Figure:
    """Bytes sent so far, to the server and back, by round."""
    across = [r["round"] for r in rounds]
    total = max((sum(r[key] for r in rounds) for key in ("bytes_up", "bytes_down")), default=0)
    unit, scale = next(
        (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if total >= s or s == 1
    )
    traces = []
    for key, name, hue in (
        ("bytes_up", "clients to server", ROW_COLOURS["federated"]),
        ("bytes_down", "server to clients", ROW_COLOURS["centralised"]),
    ):
        sums = list(accumulate(r[key] for r in rounds))
        style = "solid" if key == "bytes_up" else "dash"  # often equal, and both must be visible
        traces.append(
            go.Scatter(
                x=across,
                y=[s / scale for s in sums],
                mode="lines",
                line={"color": hue, "width": 2.5, "dash": style},
                name=name,
                text=[f"{name}: {byte_size(s)}" for s in sums],
                hoverinfo="text",
            )
        )
    return figure(
        traces,
        height=300,
        showlegend=True,
        hovermode="x unified",
        xaxis={"title": axis_title("round"), "dtick": step(len(rounds))},
        yaxis={"title": axis_title(unit), "rangemode": "tozero"},
    )


def _rounds(journals: Mapping[str, Sequence[Sequence[Record]]]) -> dict[str, Any]:
    last = max((r["round"] for seeds in journals.values() for records in seeds for r in records), default=1)
    return rounds_axis(last)
