"""The figures of results: every row, by group, by client, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from fedloom.report.drawing import FAINT, ROW_BY_ROW, SHOWN_CLIENTS, axis_title, figure, label, ticks, within
from fedloom.report.findings import entry, main_metric, methods, own, rows, single_clients
from fedloom.report.marks import GROUP_COLOURS, ROW_COLOURS, bar, colour, symbol
from fedloom.report.terms import axis, factor, title, value
from fedloom.rows import Row
from fedloom.statistics import evenly

ALONE = "each client alone"  # the line of rows_figure for every client's own model


def partition_figure(partition: Mapping[str, Any]) -> go.Figure:
    """Who holds what: one bar per client, stacked by category or owner."""
    held = {c["client"]: c["counts"] for c in partition["clients"]}
    clients, groups = evenly(list(held), SHOWN_CLIENTS), list(partition["totals"])
    lying = len(clients) <= ROW_BY_ROW
    place = list(range(len(clients)))
    one_each = all(sum(n > 0 for n in held[c].values()) <= 1 for c in clients)
    traces = []
    for k, group in enumerate(groups):
        counts = [held[c].get(group, 0) for c in clients]
        hue = ROW_COLOURS["federated"] if one_each else GROUP_COLOURS[k % len(GROUP_COLOURS)]
        hover = [f"{label(c)}<br>{label(group)}: {n}" for c, n in zip(clients, counts, strict=True)]
        traces.append(
            go.Bar(
                x=counts if lying else place,
                y=place if lying else counts,
                orientation="h" if lying else "v",
                name=label(group),
                marker=bar(hue, 0 if one_each else k),
                hovertext=hover,
                hoverinfo="text",
                showlegend=not one_each,
            )
        )
    names = ticks(clients)
    if lying:
        height = 24 * len(clients) + 90 + (0 if one_each else 50)
        return figure(
            traces,
            height=height,
            barmode="stack",
            bargap=0.25,
            hovermode="closest",
            xaxis={"title": axis_title("training examples")},
            yaxis={**names, "autorange": "reversed"},
        )
    return figure(
        traces,
        height=400,
        barmode="stack",
        bargap=0.1 if len(clients) <= 60 else 0,
        hovermode="closest",
        xaxis={**names, "title": axis_title("client"), "showgrid": False},
        yaxis={"title": axis_title("training examples")},
    )


def rows_figure(summary: Mapping[str, Any]) -> go.Figure:
    """The main metric of every row: mean, 95% interval, seeds as faint dots; single clients on one line."""
    metric, names = main_metric(summary), rows(summary)
    alone = [row for row in single_clients(summary) if Row.parse(row).alone]
    scale, labels = factor(metric), list(methods(summary))
    lines = [
        *names[:1],
        *([ALONE] if alone else []),
        *names[1:],
    ]  # base, then the clients one by one, then the rest
    traces: list[Any] = []
    for y, row in enumerate(lines):
        if row == ALONE:
            found = [e for c in alone if (e := entry(summary, c, metric)) is not None]
            hover = [f"{label(title(e['row']))}: {value(metric, e['mean'])}" for e in found]
            traces.append(
                _dots(
                    [scale * e["mean"] for e in found],
                    y,
                    ROW_COLOURS["local_only"],
                    size=8,
                    opacity=0.55,
                    hover=hover,
                )
            )
            continue
        shown = entry(summary, row, metric)
        if shown is None:
            continue
        hue, mean, ci95 = colour(row, labels), shown["mean"], shown["ci95"]
        if len(shown["values"]) > 1:
            traces.append(
                _dots([scale * v for v in shown["values"]], y + 0.24, hue, size=5, opacity=0.5, hover=None)
            )
        bars = (
            None
            if ci95 is None
            else {"type": "data", "array": [scale * (ci95[1] - mean)], "thickness": 2, "width": 7}
        )
        interval = (
            "" if ci95 is None else f"<br>95% interval {value(metric, ci95[0])} to {value(metric, ci95[1])}"
        )
        traces.append(
            go.Scatter(
                x=[scale * mean],
                y=[y],
                mode="markers",
                marker={"size": 12, "color": hue, "symbol": symbol(row, labels)},
                error_x=bars,
                showlegend=False,
                hovertext=[f"{label(title(row, own(summary)))}: {value(metric, mean)}{interval}"],
                hoverinfo="text",
            )
        )
    names_ = {
        "tickvals": list(range(len(lines))),
        "ticktext": [
            "Local only, each client" if n == ALONE else label(title(n, own(summary))) for n in lines
        ],
    }
    return figure(
        traces,
        height=44 * len(lines) + 80,
        hovermode="closest",
        xaxis={
            "title": axis_title(axis(metric)),
            **within(metric),
            **({} if metric == "loss" else {"rangemode": "tozero"}),
        },
        yaxis={**names_, "range": [len(lines) - 0.5, -0.5]},
    )


def _dots(
    xs: Sequence[float], y: float, colour: str, *, size: int, opacity: float, hover: Sequence[str] | None
) -> go.Scatter:
    return go.Scatter(
        x=list(xs),
        y=[y] * len(xs),
        mode="markers",
        marker={"size": size, "color": colour, "opacity": opacity},
        showlegend=False,
        hovertext=hover,
        hoverinfo="skip" if hover is None else "text",
    )


def groups_figure(
    table: Mapping[str, Mapping[str, float]], metric: str, *, own: str | None = None
) -> go.Figure:
    """Rows by groups of the held-out examples; a stronger colour is better.

    `table` is row -> group -> value.
    """
    names = list(table)
    groups = list(dict.fromkeys(g for found in table.values() for g in found))
    cells = [[table[n].get(g) for g in groups] for n in names]
    known = [x for line in cells for x in line if x is not None]
    # Shares start at zero, and a few percent are not coloured as if they were much.
    low, high = (min(known), max(known)) if metric == "loss" and known else (0.0, max([0.25, *known]))
    scale = [(0.0, "rgba(59,125,216,0.03)"), (1.0, "rgba(59,125,216,0.62)")]
    written = [[_cell(metric, x) for x in line] for line in cells]
    hover = [
        [f"{label(title(n, own))}<br>{label(g)}: {value(metric, table[n].get(g))}" for g in groups]
        for n in names
    ]
    grid = go.Heatmap(
        x=list(range(len(groups))),
        y=list(range(len(names))),
        z=cells,
        zmin=low,
        zmax=high,
        colorscale=scale,
        reversescale=metric == "loss",
        showscale=False,
        xgap=2,
        ygap=2,
        text=written,
        hovertext=hover,
        hoverinfo="text",
        texttemplate="%{text}",
    )
    # With breaks at spaces and underscores, names of several words fit above their columns.
    heads = [label(g, 32).replace("_", " ").replace(" ", "<br>") for g in groups]
    return figure(
        [grid],
        height=30 * len(names) + 70,
        hovermode="closest",
        margin={"l": 10, "r": 16, "t": 30, "b": 8},
        meta={"least": 130 + 42 * len(groups)},  # pixels: enough for headings and digits
        xaxis={"tickvals": list(range(len(groups))), "ticktext": heads, "showgrid": False, "side": "top"},
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": [label(title(n, own)) for n in names],
            "showgrid": False,
            "autorange": "reversed",
        },
    )


def _cell(metric: str, x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if metric == "loss" else f"{100 * x:.0f}"


def clients_figure(
    table: Mapping[str, Mapping[str, float]], metric: str, *, own: str | None = None
) -> go.Figure:
    """Each client's result on its own mix of groups.

    `table` is client -> row -> value, with rows named as in ROW_COLOURS.
    """
    clients = evenly(list(table), 40)
    scale = factor(metric)
    traces: list[Any] = []
    for y, client in enumerate(clients):
        ends = [scale * x for x in table[client].values()]
        traces.append(
            go.Scatter(
                x=[min(ends), max(ends)],
                y=[y, y],
                mode="lines",
                line={"color": FAINT, "width": 5},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    names = list(dict.fromkeys(r for found in table.values() for r in found))
    for nth, row in enumerate(names):
        aside = 0.14 * (
            nth - (len(names) - 1) / 2
        )  # equal values are drawn one above the other, not hidden behind each other
        having = [(y, c) for y, c in enumerate(clients) if row in table[c]]
        name = "This client alone" if row == "local_only" else title(row, own)
        traces.append(
            go.Scatter(
                x=[scale * table[c][row] for _, c in having],
                y=[y + aside for y, _ in having],
                mode="markers",
                name=name,
                marker={"size": 10, "color": colour(row), "symbol": symbol(row), "opacity": 0.9},
                hovertext=[f"{label(c)}<br>{name}: {value(metric, table[c][row])}" for _, c in having],
                hoverinfo="text",
            )
        )
    return figure(
        traces,
        height=30 * len(clients) + 130,
        hovermode="closest",
        showlegend=True,
        xaxis={"title": axis_title(axis(metric))},
        yaxis={**ticks(clients, every=True), "range": [len(clients) - 0.5, -0.5]},
    )
