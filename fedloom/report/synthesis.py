"""Generated candidates: how many met each fate, and a few texts of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from fedloom.report import drawing, marks
from fedloom.report.findings import Summary, own
from fedloom.report.pictures import Picture
from fedloom.report.terms import title
from fedloom.synthesis.candidates import KEPT

# In the order in which a candidate may meet them.
MEANINGS = {
    KEPT: "Good: trained on, or chosen from.",
    "failed/unfinished": "The instruction did not end within its limit of tokens.",
    "failed/empty": "No instruction was written.",
    "failed/no-output": "The text stopped before a response began.",
    "failed/empty-output": "The response is empty.",
    "failed/unfinished-output": "The response did not end within its limit of tokens.",
    "failed/long-input": "Its instruction and context are too long for the model.",
    "filtered/format": "Marks of the prompt's own format, or no words.",
    "filtered/refusal": "It begins like a refusal, or plays a role.",
    "filtered/short": "The instruction has too few words.",
    "filtered/long": "The instruction has too many words.",
    "filtered/keyword": "It asks for something a text model cannot do or see.",
    "filtered/repetitive": "The response says the same words again and again.",
    "filtered/near-instruction": "Too close to an instruction of the client's own: it would reveal it.",
    "filtered/copy": "A copy of an example of the client's own.",
    "filtered/near-example": "Too close to an example of the client's own: it would reveal it.",
    "filtered/verbatim": "It repeats a long run of the client's own words.",
    "filtered/duplicate": "Generated before.",
    "filtered/surplus": "Good, but enough had been found.",
}
NO_FATES = ("generated", "repeated")  # sums beside the fates

# Three families, told apart by hue, and their members by shade and pattern.
HUES = {
    KEPT: ("#2a9d78",),
    "failed": ("#8a919c", "#6d7480", "#8c94a0", "#636b77", "#89939f", "#626b79"),
    "filtered": (
        "#1f9cda",
        "#4f9cc4",
        "#6f69c9",
        "#8f89d9",
        "#979732",
        "#9b9642",
        "#be8926",
        "#ac4965",
        "#cc6677",
        "#db7384",
        "#aa4499",
        "#c27a1a",
    ),
}


def pictures(summary: Summary) -> dict[str, Picture]:
    made = summary.get("synthesis", {})
    if not any(found["counts"].get("generated") for found in made.values()):
        return {}
    label = "Shares of the generated candidates by fate; the tables below hold the numbers."
    return {"fates": Picture("fates", label, fates_figure(summary))}


def fates_figure(summary: Summary) -> go.Figure:
    """One bar per method, stacked by fate, in percent of all candidates."""
    made = {label: found for label, found in summary["synthesis"].items() if found["counts"].get("generated")}
    every = {fate: 0 for found in made.values() for fate in fates(found["counts"])}
    traces = []
    for nth, fate in enumerate(_ordered(every)):
        counts = [found["counts"].get(fate, 0) for found in made.values()]
        shares = [
            100 * n / found["counts"]["generated"] for n, found in zip(counts, made.values(), strict=True)
        ]
        traces.append(
            go.Bar(
                x=shares,
                y=list(range(len(made))),
                orientation="h",
                name=drawing.label(fate),
                marker=marks.bar(colour(fate), nth),
                hovertext=[
                    f"{drawing.label(fate)}: {n} ({s:.1f}%)" for n, s in zip(counts, shares, strict=True)
                ],
                hoverinfo="text",
            )
        )
    names = [drawing.label(title(label, own(summary)), 28) for label in made]
    return drawing.figure(
        traces,
        height=46 * len(made) + 150,
        barmode="stack",
        bargap=0.3,
        hovermode="closest",
        showlegend=True,
        xaxis={"title": drawing.axis_title("share of candidates, %"), "range": [0, 100]},
        yaxis={"tickvals": list(range(len(made))), "ticktext": names, "autorange": "reversed"},
    )


def tally(label: str, own: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One method's counts and texts, in the form the page shows."""
    counts, generated = found["counts"], found["counts"].get("generated", 0)
    order = _ordered(fates(counts))

    def line(fate: str) -> dict[str, Any]:
        return {"fate": fate, "meaning": meaning(fate), "colour": colour(fate)}

    def share(count: int) -> str:
        return f"{100 * count / generated:.1f}%" if generated else "–"

    return {
        "title": title(label, own),
        "kept": counts.get(KEPT, 0),
        "generated": generated,
        "share": share(counts.get(KEPT, 0)),
        "repeated": counts.get("repeated", 0),
        "fates": [{**line(fate), "count": counts[fate], "share": share(counts[fate])} for fate in order],
        "samples": [
            {**line(fate), "texts": texts}
            for fate in _ordered(found["samples"])
            if (texts := found["samples"][fate])
        ],
    }


def fates(counts: Mapping[str, int]) -> dict[str, int]:
    return {fate: count for fate, count in counts.items() if fate not in NO_FATES}


def meaning(fate: str) -> str:
    family = fate.partition("/")[0]
    return MEANINGS.get(fate) or {"failed": "No usable text.", "filtered": "Dropped by a filter."}.get(
        family, ""
    )


def colour(fate: str) -> str:
    """A fate's mark, the same wherever it appears."""
    family = fate.partition("/")[0]
    hues, members = HUES.get(family, HUES["filtered"]), [f for f in MEANINGS if f.partition("/")[0] == family]
    return hues[members.index(fate) % len(hues)] if fate in members else hues[-1]


def _ordered(found: Mapping[str, Any]) -> list[str]:
    return [fate for fate in MEANINGS if fate in found] + sorted(f for f in found if f not in MEANINGS)
