"""The page's section on the findings of `fedloom audit`: its lines, exposures and AUCs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from fedloom.errors import RunError
from fedloom.report import drawing, marks
from fedloom.report.pictures import Picture
from fedloom.report.readings import SCORES, gate, interval, lines
from fedloom.report.terms import NOT_SEEN
from fedloom.storage.files import AUDIT

SCHEMA = 1
PLANTED, UNSEEN, BASE = "#cc6677", "#3b7dd8", marks.ROW_COLOURS["base"]


def read(folder: Path) -> Mapping[str, Any] | None:
    """The run's audit; None if there was none. Raises: RunError."""
    path = folder / AUDIT
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as damage:
        raise RunError(
            f"{path} cannot be read: {type(damage).__name__}. Delete it, or audit again: fedloom audit {folder}"
        ) from damage
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "positions" not in found:
        raise RunError(
            f"{path}: expected an audit of schema {SCHEMA}. Delete it, or audit again: fedloom audit {folder}"
        )
    return found


def shown(audit: Mapping[str, Any], adapter_sha256: str) -> dict[str, Any]:
    """Everything that the page's section shows."""
    return {
        "groups": lines(audit),
        "targets": audit["targets"],
        "gate": [told.text for told in gate(audit)],
        "passed": audit["passed"],
        "other": audit["adapter_sha256"] != adapter_sha256,
    }


# --- figures ---------------------------------------------------------------------------------------------


def pictures(audit: Mapping[str, Any]) -> dict[str, Picture]:
    """Key -> figure: "exposures" if secrets were planted, and "aucs"."""
    public, made = audit["positions"]["public"], {}
    if "reason" not in public["exposure"]:
        label = "Exposure of planted and of held-out secrets, with the distribution for secrets never seen."
        made["exposures"] = Picture(
            "exposures", label, exposures_figure(public["exposure"]), *_exposures_table(public["exposure"])
        )
    label = "AUC of five scores that tell members from others, of the released model and of the base."
    made["aucs"] = Picture(
        "aucs", label, aucs_figure(public["membership"]), *_aucs_table(public["membership"])
    )
    return made


def exposures_figure(exposure: Mapping[str, Any]) -> go.Figure:
    """Shares of secrets by whole bits, planted beside held out, and the share expected by chance in each bin.

    A secret never seen has an exposure of at least x with probability 2^-x, so half of them lie below one
    bit, a quarter between one and two, and so on; the remainder lies in the last bin.
    """
    known = exposure["released"]["calibrated"]
    planted, unseen, chance = _bins(known)
    bins = len(chance)
    traces: list[Any] = []
    for nth, (side, name, hue) in enumerate(
        (("planted", "planted", PLANTED), ("held_out", "never planted", UNSEEN))
    ):
        bits, counts = known[side]["bits"], planted if side == "planted" else unseen
        traces.append(
            go.Bar(
                x=[i + 0.5 for i in range(bins)],
                y=[100 * n / max(1, len(bits)) for n in counts],
                name=f"{name}, mean {known[side]['mean']:.2f} bits" if bits else name,
                marker=marks.bar(hue, nth),
                hovertext=[f"{name}, {i} to {i + 1} bits: {n} of {len(bits)}" for i, n in enumerate(counts)],
                hoverinfo="text",
            )
        )
    traces.append(
        go.Scatter(
            x=[i + 0.5 for i in range(bins)],
            y=chance,
            mode="lines+markers",
            line={"color": BASE, "width": 2, "dash": "dash"},
            name=f"never seen, mean {NOT_SEEN:.2f} bits",
            hovertext=[f"never seen, {i} to {i + 1} bits: {p:.1f}%" for i, p in enumerate(chance)],
            hoverinfo="text",
        )
    )
    return drawing.figure(
        traces,
        height=340,
        barmode="group",
        bargap=0.15,
        hovermode="closest",
        showlegend=True,
        xaxis={
            "title": drawing.axis_title("exposure, bits"),
            "range": [0, bins],
            "dtick": max(1, bins // 12),
        },
        yaxis={"title": drawing.axis_title("share of secrets, %"), "rangemode": "tozero"},
    )


def _bins(known: Mapping[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """By whole bits: planted secrets, secrets never planted, and the percentage expected by chance."""
    bins = max(1, -int(-known["ceiling"] // 1))
    counts = {side: [0] * bins for side in ("planted", "held_out")}
    for side, its in counts.items():
        for b in known[side]["bits"]:
            its[min(bins - 1, max(0, int(b)))] += 1
    chance = [100 * (2.0**-i - (2.0 ** -(i + 1) if i + 1 < bins else 0.0)) for i in range(bins)]
    return counts["planted"], counts["held_out"], chance


def _exposures_table(exposure: Mapping[str, Any]) -> tuple[list[str], list[list[str | int]]]:
    found = zip(*_bins(exposure["released"]["calibrated"]), strict=True)
    return ["bits", "planted", "never planted", "by chance"], [
        [f"{i} to {i + 1}", a, b, f"{c:.1f}%"] for i, (a, b, c) in enumerate(found)
    ]


def aucs_figure(rows: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """The five scores: released model and base side by side, 95% intervals over records, and a coin toss."""
    names = list(rows["released"])
    traces = []
    for row, name, hue, shape, shift in (
        ("released", "released model", PLANTED, "circle", -0.12),
        ("base", "untuned base", BASE, "square", 0.12),
    ):
        found = [rows[row][score] for score in names]
        traces.append(
            go.Scatter(
                x=[one["auc"] for one in found],
                y=[i + shift for i in range(len(names))],
                mode="markers",
                name=name,
                marker={"size": 10, "color": hue, "symbol": shape},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [one["auc_ci95"][1] - one["auc"] for one in found],
                    "arrayminus": [one["auc"] - one["auc_ci95"][0] for one in found],
                    "thickness": 1.5,
                    "width": 4,
                    "color": hue,
                },
                hovertext=[
                    f"{name}, {SCORES.get(s, s)}: {one['auc']:.2f} ({interval(one['auc_ci95'], scale=1)})"
                    for s, one in zip(names, found, strict=True)
                ],
                hoverinfo="text",
            )
        )
    coin = {"type": "line", "x0": 0.5, "x1": 0.5, "yref": "paper", "y0": 0, "y1": 1}
    return drawing.figure(
        traces,
        height=340,
        hovermode="closest",
        showlegend=True,
        shapes=[{**coin, "line": {"color": BASE, "width": 1.5, "dash": "dot"}}],
        xaxis={"title": drawing.axis_title("AUC (0.5: a coin)"), "range": [0, 1.02]},
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": [drawing.label(SCORES.get(s, s)) for s in names],
            "range": [len(names) - 0.5, -0.5],
        },
    )


def _aucs_table(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str | int]]]:
    head = ["score", "released", "95% interval", "base", "95% interval"]
    body: list[list[str | int]] = []
    for score in rows["released"]:
        one, other = rows["released"][score], rows["base"][score]
        cells = [c for x in (one, other) for c in (f"{x['auc']:.2f}", interval(x["auc_ci95"], scale=1))]
        body.append([SCORES.get(score, score), *cells])
    return head, body
