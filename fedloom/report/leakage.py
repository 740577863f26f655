"""Draw the leakage of shared models: quality against leakage, and leakage by round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from fedloom.algorithms.names import canonical
from fedloom.evaluation.metrics import LEAKS
from fedloom.report import drawing, marks, round_figures
from fedloom.report.findings import Summary, entry, leaks, main_metric, methods, own, rows
from fedloom.report.pictures import Journals, Picture
from fedloom.report.rounds import Record
from fedloom.report.terms import NOT_SEEN, Interval, axis, factor, less, metric_title, short, title, value
from fedloom.statistics import Estimate, estimate

CHANCE = {"exposure": (NOT_SEEN, "never seen"), "auc": (0.5, "a coin")}  # of a model that saw nothing
SWEPT = "fewfedpit"


def pictures(summary: Summary, journals: Journals) -> dict[str, Picture]:
    """Key -> picture: "leaks" and "leak_METRIC", except where nothing was measured."""
    return {p.key: p for p in (*_trade(summary), *_by_round(summary, journals))}


def _trade(summary: Summary) -> Iterator[Picture]:
    measured = leaks(summary)
    if measured:
        metric = main_metric(summary)
        label = f"{metric_title(metric)} against {metric_title(measured[0])}; the table of results holds the numbers."
        yield Picture("leaks", label, trade_figure(summary, metric, measured[0]))


def trade_figure(summary: Summary, metric: str, leak: str) -> go.Figure:
    """One point per row, quality upwards and leakage to the right, with any 95% intervals over seeds.

    FewFedPIT's rows are joined in order of their private share.
    """
    labels, traces = list(methods(summary)), []
    swept = {
        row: share for row, share in private_shares(summary).items() if _both(summary, row, metric, leak)
    }
    if len(swept) > 1:
        line = sorted(swept, key=lambda row: swept[row])
        ends = [_both(summary, row, metric, leak) for row in line]
        traces.append(
            go.Scatter(
                x=[factor(leak) * e[1]["mean"] for e in ends if e],
                y=[factor(metric) * e[0]["mean"] for e in ends if e],
                mode="lines",
                line={"color": marks.ROW_COLOURS["federated"], "width": 1.5, "dash": "dot"},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    points = [row for row in rows(summary) if _both(summary, row, metric, leak)]
    for row in points:
        found = _both(summary, row, metric, leak)
        if found is None:
            continue
        up, right = found
        named = title(row, own(summary)) + (f", β = {swept[row]:g}" if row in swept else "")
        hue = marks.colour(row, labels)
        traces.append(
            go.Scatter(
                x=[factor(leak) * right["mean"]],
                y=[factor(metric) * up["mean"]],
                mode="markers+text",
                text=[drawing.label(short(row) + (f", β = {swept[row]:g}" if row in swept else ""), 32)],
                textposition="top center",  # the page moves it clear of marks, or leaves it to the legend
                textfont={"size": 12},
                marker={"size": 12, "color": hue, "symbol": marks.symbol(row, labels)},
                error_x=_bar(right, leak, hue),
                error_y=_bar(up, metric, hue),
                name=drawing.label(named),
                hovertext=[
                    f"{drawing.label(named)}<br>{metric_title(metric)} {_said(metric, up)}"
                    f"<br>{metric_title(leak)} {_said(leak, right)}"
                ],
                hoverinfo="text",
            )
        )
    across = {"title": drawing.axis_title(f"{axis(leak)} ({less(leak)})"), **drawing.within(leak)}
    upwards = {"title": drawing.axis_title(axis(metric)), **drawing.within(metric)}
    shapes, notes = _chance(leak, vertical=True)
    return drawing.figure(
        traces,
        height=460,
        hovermode="closest",
        showlegend=True,
        xaxis=across,
        yaxis=upwards,
        shapes=shapes,
        annotations=notes,
    )


def private_shares(summary: Summary) -> dict[str, float]:
    """row -> beta, for FewFedPIT's rows."""
    every = {"federated": summary["experiment"]["algorithm"], **methods(summary)}
    return {row: float(its["private_share"]) for row, its in every.items() if canonical(its["name"]) == SWEPT}


def _both(
    summary: Summary, row: str, metric: str, leak: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    up, right = entry(summary, row, metric), entry(summary, row, leak)
    return None if up is None or right is None else (up, right)


def _bar(found: Mapping[str, Any], metric: str, hue: str) -> dict[str, Any] | None:
    if found["ci95"] is None:
        return None
    half = factor(metric) * (found["ci95"][1] - found["mean"])
    return {"type": "data", "array": [half], "thickness": 1.2, "width": 4, "color": hue}


def _said(metric: str, found: Mapping[str, Any]) -> str:
    ci95: Interval = found["ci95"]
    interval = "" if ci95 is None else f" (95% interval {value(metric, ci95[0])} to {value(metric, ci95[1])})"
    return value(metric, found["mean"]) + interval


def _chance(leak: str, *, vertical: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A labelled line at the value of a model that never saw the secrets or records."""
    if leak not in CHANCE:
        return [], []
    at, said = CHANCE[leak]
    here, there = ("x", "y") if vertical else ("y", "x")
    line = {f"{here}0": at, f"{here}1": at, f"{there}0": 0, f"{there}1": 1, f"{there}ref": "paper"}
    hue = marks.ROW_COLOURS["base"]
    shape = {"type": "line", **line, "line": {"color": hue, "width": 1.5, "dash": "dot"}}
    note = {
        here: at,
        there: 1,
        f"{there}ref": "paper",
        "text": f"{said} {value(leak, at)}",
        "showarrow": False,
        "xanchor": "left" if vertical else "right",
        "yanchor": "top" if vertical else "bottom",
    }
    return [shape], [note]


# --- by round --------------------------------------------------------------------------------------------


def leak_curve(records: Sequence[Record], metric: str) -> dict[int, float]:
    """round -> leakage, in the rounds where it was measured; round 0 is the untuned base."""
    found = {r["round"]: (r.get("leakage") or {}).get(metric) for r in records}
    return {r: x for r, x in found.items() if x is not None}


def over_seeds(curves: Sequence[Mapping[int, float]]) -> dict[int, Estimate]:
    """round -> mean and interval, in the rounds that every seed has."""
    if not curves:
        return {}
    return {r: estimate([c[r] for c in curves]) for r in curves[0] if all(r in c for c in curves)}


def _by_round(summary: Summary, journals: Journals) -> Iterator[Picture]:
    for metric in LEAKS:
        curves = {
            row: over_seeds([c for records in seeds if (c := leak_curve(records, metric))])
            for row, seeds in journals.items()
        }
        curves = {row: found for row, found in curves.items() if any(r > 0 for r in found)}
        if curves:
            across = sorted({r for found in curves.values() for r in found})
            head = ["round", *(round_figures.curve_title(row, own(summary)) for row in curves)]
            body: list[list[str | int]] = [
                [r, *(value(metric, f[r].mean if r in f else None) for f in curves.values())] for r in across
            ]
            label = f"{metric_title(metric)} of the shared model by round."
            yield Picture(f"leak_{metric}", label, rounds_figure(summary, curves, metric), head, body)


def rounds_figure(summary: Summary, curves: Mapping[str, Mapping[int, Estimate]], metric: str) -> go.Figure:
    """Lines of means with bands of 95% intervals over seeds; dashed: the untuned base, which is round 0."""
    traces: list[Any] = []
    for row, found in curves.items():
        labels = list(methods(summary))
        hue, named = marks.colour(row, labels), round_figures.curve_title(row, own(summary))
        later = [r for r in found if r > 0]
        bands = [(r, ci95) for r in later if (ci95 := found[r].ci95) is not None]
        if bands:
            traces.append(
                go.Scatter(
                    x=[r for r, _ in bands] + [r for r, _ in reversed(bands)],
                    y=[factor(metric) * c[1] for _, c in bands]
                    + [factor(metric) * c[0] for _, c in reversed(bands)],
                    fill="toself",
                    fillcolor=hue,
                    opacity=0.13 if len(curves) <= 4 else 0.06,
                    line={"width": 0},
                    mode="lines",
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        traces.append(
            go.Scatter(
                x=later,
                y=[factor(metric) * found[r].mean for r in later],
                mode="lines+markers" if len(later) <= 30 else "lines",
                line={"color": hue, "width": 2.5, "dash": marks.dash(row, labels)},
                marker={"size": 7, "symbol": marks.symbol(row, labels)},
                name=drawing.label(named),
                hovertext=[f"{drawing.label(named)}: {value(metric, found[r].mean)}" for r in later],
                hoverinfo="text",
            )
        )
    last = max(r for found in curves.values() for r in found)
    base = next((found[0].mean for found in curves.values() if 0 in found), None)
    if base is not None:
        traces.append(
            go.Scatter(
                x=[1, last],
                y=[factor(metric) * base] * 2,
                mode="lines",
                line={"color": marks.ROW_COLOURS["base"], "width": 2, "dash": "dash"},
                name=f"base {value(metric, base)}",
                hoverinfo="skip",
            )
        )
    shapes, notes = _chance(metric, vertical=False)
    return drawing.figure(
        traces,
        height=360 + 20 * len(curves),  # the legend takes one line per row
        hovermode="x unified",
        showlegend=True,
        shapes=shapes,
        annotations=notes,
        xaxis=drawing.rounds_axis(last),
        yaxis={"title": drawing.axis_title(axis(metric)), **drawing.within(metric)},
    )
