"""The report's figures. Transparent, and free of ink colours: the page gives them its own, light or dark.

Names come from data, so they are escaped (Plotly reads a few HTML tags in its texts) and never used as
an axis value: two long names that look alike when cut stay two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from fedloom.experiment.summary import LOCAL
from fedloom.report.findings import (
    axis,
    byte_size,
    entry,
    factor,
    main_metric,
    methods,
    own,
    rows,
    single_clients,
    title,
    value,
)
from fedloom.report.marks import (
    GROUP_COLOURS as GROUP_COLOURS,
)
from fedloom.report.marks import (
    ROW_COLOURS,
    bar,
    colour,
    dash,
    symbol,
)
from fedloom.report.rounds import Part, Record, What, base_loss, loss_curve, mean_curve, part

FAINT = "rgba(128,128,128,0.14)"

SHOWN_CLIENTS = 400  # more would be thinner than a pixel; evenly chosen from more
ROW_BY_ROW = 24  # up to here every client gets a line with its name


def shown_clients(names: Sequence[str], limit: int = SHOWN_CLIENTS) -> list[str]:
    """All of them, or `limit` at equal steps."""
    if len(names) <= limit:
        return list(names)
    return [names[int(i * len(names) / limit)] for i in range(limit)]


def partition_figure(partition: Mapping[str, Any]) -> go.Figure:
    """Who holds what: a bar for each client, stacked by category or owner."""
    held = {c["client"]: c["counts"] for c in partition["clients"]}
    clients, groups = shown_clients(list(held)), list(partition["totals"])
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
    names = _ticks(clients)
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


def loss_figure(
    journals: Mapping[str, Sequence[Sequence[Record]]],
    *,
    what: What,
    own: str | None = None,
    labels: Sequence[str] = (),
) -> go.Figure:
    """A loss by round: thin lines for the seeds, a thick one for their mean.

    `journals` is row -> seeds -> records. The horizontal line is the base model on the
    same held-out examples, the mean over seeds.
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
SIGNS: dict[Part, str] = {"refused": "×", "no answer": "?"}  # in a cell, where there is room


def participation_figure(clients: Sequence[str], records: Sequence[Record]) -> go.Figure:
    """Clients by rounds: who was selected, who answered, who was refused."""
    names, rounds = shown_clients(clients), [r for r in records if r["round"] > 0]
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
    written = len(names) <= ROW_BY_ROW and len(rounds) <= ROW_BY_ROW  # elsewhere cells are too small
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
    across = {"title": axis_title("round"), "dtick": _step(len(rounds)), "showgrid": False}
    return figure(
        [grid, *legend],
        height=height,
        xaxis=across,
        showlegend=True,
        hovermode="closest",
        yaxis={**_ticks(names), "showgrid": False, "autorange": "reversed"},
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
        style = "solid" if key == "bytes_up" else "dash"  # often equal: both must be seen
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
        xaxis={"title": axis_title("round"), "dtick": _step(len(rounds))},
        yaxis={"title": axis_title(unit), "rangemode": "tozero"},
    )


def rows_figure(summary: Mapping[str, Any]) -> go.Figure:
    """The main metric of every row: mean, 95% interval, seeds as faint dots; single clients on one line."""
    metric, names = main_metric(summary), rows(summary)
    alone = [row for row in single_clients(summary) if row.startswith(LOCAL)]
    scale, labels = factor(metric), list(methods(summary))
    lines = [
        *names[:1],
        *([LOCAL] if alone else []),
        *names[1:],
    ]  # base, then the clients one by one, then the rest
    traces: list[Any] = []
    for y, row in enumerate(lines):
        if row == LOCAL:
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
            "Local only, each client" if n == LOCAL else label(title(n, own(summary))) for n in lines
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
    """Rows by groups of the held-out examples; the fuller the colour, the better.

    `table` is row -> group -> value.
    """
    names = list(table)
    groups = list(dict.fromkeys(g for found in table.values() for g in found))
    cells = [[table[n].get(g) for g in groups] for n in names]
    known = [x for line in cells for x in line if x is not None]
    # Shares begin at nothing, and a few percent are not painted as if they were much.
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
    # Broken at spaces and underscores, names of several words fit above their columns.
    heads = [label(g, 32).replace("_", " ").replace(" ", "<br>") for g in groups]
    return figure(
        [grid],
        height=30 * len(names) + 70,
        hovermode="closest",
        margin={"l": 10, "r": 16, "t": 30, "b": 8},
        meta={"least": 130 + 42 * len(groups)},  # pixels: columns hold their headings and digits
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
    """What each client gets, in its own mix of groups.

    `table` is client -> row -> value, a row named as in ROW_COLOURS.
    """
    clients = shown_clients(list(table), 40)
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
        )  # equal values lie one above the other, not one behind the other
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
        yaxis={**_ticks(clients, every=True), "range": [len(clients) - 0.5, -0.5]},
    )


# --- what all of them share ------------------------------------------------------------------------------


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
    """An interval over two seeds reaches far beyond what a share can be; the axis need not."""
    limits = {"loss": {}, "exposure": {"clipmin": 0}, "auc": {"clipmin": 0, "clipmax": 1}}
    return {"autorangeoptions": limits.get(metric, {"clipmin": -3, "clipmax": 103})}


def axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}}


def _ticks(names: Sequence[str], *, longest: int = 28, every: bool = False) -> dict[str, Any]:
    """Names at 0, 1, 2, ...; only every so many where there are too many to read."""
    step = 1 if every or len(names) <= ROW_BY_ROW else -(-len(names) // 12)
    shown = list(range(0, len(names), step))
    return {"tickvals": shown, "ticktext": [label(names[i], longest) for i in shown]}


def _rounds(journals: Mapping[str, Sequence[Sequence[Record]]]) -> dict[str, Any]:
    last = max((r["round"] for seeds in journals.values() for records in seeds for r in records), default=1)
    return rounds_axis(last)


def rounds_axis(last: int) -> dict[str, Any]:
    return {"title": axis_title("round"), "dtick": _step(last)}


def _step(rounds: int) -> int:
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if rounds <= 12 * s)


def label(name: str, longest: int = 60) -> str:
    name = " ".join(name.split()) or "(none)"
    return escape(name if len(name) <= longest else name[: longest - 1] + "…")
