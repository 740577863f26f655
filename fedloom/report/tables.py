"""The page's tables, and the facts around them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.text import folded
from fedloom.evaluation.metrics import better, improves
from fedloom.evaluation.own_mix import COUNTED, OUTCOMES
from fedloom.report import findings, marks, terms
from fedloom.report.findings import Summary
from fedloom.rows import Row, is_single

FEW_DIFFERENCES = 10  # of one metric: the number of pairs among five rows


def table(summary: Summary, names: Sequence[str], *, mark_best: bool = True) -> list[dict[str, Any]]:
    metrics = findings.metrics(summary)
    winners = {m: findings.best(summary, names, m) if mark_best else set() for m in metrics}
    table = []
    for name in names:
        found = {m: findings.entry(summary, name, m) for m in metrics}
        cells = [
            {
                "value": terms.value(m, e["mean"] if e else None),
                "half": terms.half_width(m, e["ci95"]) if e else "",
                "best": name in winners[m],
            }
            for m, e in found.items()
        ]
        table.append(
            {
                "title": terms.title(name, findings.own(summary)),
                "model": terms.model(name),
                "colour": marks.colour(name, list(findings.methods(summary))),
                "cells": cells,
            }
        )
    return table


def differences(summary: Summary) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """metric -> lines about the federated row, and the others; separated only where there are many."""
    table = {}
    for metric in findings.metrics(summary):
        lines = [d for d in summary["differences"] if d["metric"] == metric]
        first = [_difference(d, metric) for d in lines if "federated" in (d["a"], d["b"])]
        others = [_difference(d, metric) for d in lines if "federated" not in (d["a"], d["b"])]
        few = len(lines) <= FEW_DIFFERENCES or not first
        table[metric] = {"first": first + others if few else first, "others": [] if few else others}
    return {metric: parts for metric, parts in table.items() if parts["first"]}


def _difference(d: Mapping[str, Any], metric: str) -> dict[str, Any]:
    ci95 = d["ci95"]
    clear = findings.excludes_zero(ci95)
    reading = "not distinguishable"
    if clear:
        reading = f"{terms.short(d['a'] if improves(metric, d['mean']) else d['b'])} is better"
    return {
        "a": terms.short(d["a"]),
        "b": terms.short(d["b"]),
        "mean": f"{terms.change(metric, d['mean'])} {terms.unit(metric)}".strip(),
        "interval": "–"
        if ci95 is None
        else f"{terms.change(metric, ci95[0])} to {terms.change(metric, ci95[1])}",
        "p": "the same in every seed"
        if d.get("constant")
        else "–"
        if d["p_value"] is None
        else "< 0.001"
        if d["p_value"] < 0.001
        else f"{d['p_value']:.3f}",
        "reading": reading,
        "decided": clear,
    }


def sample(sample: Mapping[str, Any], summary: Summary, metric: str) -> dict[str, Any]:
    """A question with the rows' answers and the best single client's; the other clients' separately."""
    said = dict(sample["answers"])
    alone = [row for row in said if Row.parse(row).alone]
    first = {row: e["values"][0] for row in alone if (e := findings.entry(summary, row, metric)) is not None}
    top = next(
        (row for row, x in first.items() if not any(better(metric, y, x) for y in first.values())), None
    )
    order = ["base", top, *(row for row in said if row != "base" and not is_single(row))]
    order = [row for row in order if row is not None and row in said]
    labels, own = list(findings.methods(summary)), findings.own(summary)

    def answer(row: str) -> dict[str, Any]:
        named = f"Best single client ({Row.parse(row).client})" if row == top else terms.title(row, own)
        if right := sample["right"]:
            mark = "✓ right" if right[row] else ""
        else:
            same = folded(said[row]) == folded(sample["reference"])
            mark = "✓ same as the reference" if same else ""
        return {"title": named, "text": said[row], "mark": mark, "colour": marks.colour(row, labels)}

    return {
        **sample,
        "shown": [answer(row) for row in order],
        "rest": [answer(row) for row in said if row not in order],
    }


def own_mix(summary: Summary) -> dict[str, Any] | None:
    """How many clients gain, tie and lose by taking part, by seed and on average, and what a tie is."""
    judged_by = findings.own_mix(summary)
    if judged_by is None:
        return None
    metric, found = judged_by
    lines = [
        [f"{s['seed']}", *(f"{found[o]['values'][i]:.0f}" for o in OUTCOMES)]
        for i, s in enumerate(found["seeds"])
    ]
    if len(lines) > 1:
        most = max(len(s["clients"]) for s in found["seeds"])
        lines.append(["mean, 95% interval", *(terms.count(found[o], most=most) for o in OUTCOMES)])
    tie = "less than the weight of one answer" if metric in COUNTED else "a difference too small to show"
    return {"metric": metric, "lines": lines, "tie": tie}


def tiles(summary: Summary) -> list[tuple[str, str]]:
    """The experiment's size, at a glance."""
    e, sent = summary["experiment"], sum(r["bytes_up"] + r["bytes_down"] for r in summary["rounds"])
    seeds = len(findings.seeds(summary))
    return [
        ("clients", f"{len(summary['partition']['clients']):,}"),
        ("rounds", f"{e['rounds']:,}"),
        ("seeds" if seeds > 1 else "seed", f"{seeds}"),
        ("training examples", f"{summary['data']['train']:,}"),
        ("held-out examples", f"{summary['data']['test']:,}"),
        ("parameters trained", f"{summary['engine']['trained_parameters']:,}"),
        *([("sent, both ways", terms.byte_size(sent))] if sent else []),
    ]


def facts(summary: Summary) -> list[tuple[str, str]]:
    engine, seconds = summary["engine"], sum(r["seconds"] for r in summary["rounds"])
    tokens = sum(r["tokens"] for r in summary["rounds"])
    speed = f" ({tokens / seconds:,.0f} a second)" if seconds > 0 else ""
    return [
        *_provenance(summary),
        ("Base model", f"{summary['experiment']['model']['base']}"),
        ("Base model's sha256", str(engine["base_sha256"])),
        ("Adapter's sha256", summary["adapter_sha256"]),
        ("Prompt format", str(engine["format"])),
        ("Engine path", f"{engine['path']}: {engine['reason']}" if engine["reason"] else str(engine["path"])),
        ("Tokens trained on", f"{tokens:,}{speed}"),
        ("Time in rounds", terms.duration(seconds)),
        *((name, version) for name, version in summary["environment"].items()),
        *(
            (f"Reader: {key}", str(found))
            for key, found in summary["data"].items()
            if key not in ("test", "train")
        ),
    ]


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    """Who ran it, when and on which data; earlier versions' summaries do not say."""
    told = summary.get("provenance", {})
    files, licence = told.get("files"), told.get("licence")
    made_here = told.get("source") == "microworld"
    named = {
        "Run by": told.get("by"),
        "Started": _time(told.get("started")),
        "Finished": _time(told.get("finished")),
        "Data": f"{told['source']}{': ' + ', '.join(files) if files else ''}" if "source" in told else None,
        "Licence of the data": licence
        and (f"{licence}, generated by fedloom" if made_here else f"{licence}, as published"),
        "Data's sha256": told.get("data_sha256")
        and told["data_sha256"] + (", of the first seed's split" if len(findings.seeds(summary)) > 1 else ""),
    }
    return [(name, text) for name, text in named.items() if text]


def _time(iso: str | None) -> str | None:
    return None if iso is None else f"{iso[:19].replace('T', ' ')} UTC"


def command(summary: Summary) -> str:
    return f"fedloom {summary['kind']} experiment.toml --out {shlex.quote(summary['name'] + '-again')}"
