"""report.html: everything a run or a comparison found, in one page that fetches nothing.

The page's content security policy names its scripts by their hashes and allows no connection, so that
neither a text in the data nor a library can load or send anything. Without scripts the figures are
missing, and every number is still there in tables.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedloom.data.text import folded
from fedloom.errors import RunError
from fedloom.evaluation.own_mix import COUNTED, OUTCOMES
from fedloom.experiment.summary import (
    LOCAL,
    LOWER,
    SCHEMA,
    better,
    improves,
    is_single,
    read_judged,
    read_summary,
)
from fedloom.report import (
    audit,
    bundle,
    endings,
    figures,
    findings,
    judged,
    leakage,
    pictures,
    rounds,
    synthesis,
)
from fedloom.report.pictures import Journals
from fedloom.storage import durable, journal

NEEDED = (
    "kind",
    "name",
    "experiment",
    "rows",
    "differences",
    "groups",
    "samples",
    "rounds",
    "adapter_sha256",
    "partition",
    "data",
    "engine",
    "environment",
)
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}; "
    "base-uri 'none'; form-action 'none'"
)
FEW_DIFFERENCES = 10  # of one metric: as many as five rows have

Summary = Mapping[str, Any]


def write(folder: Path) -> Path:
    """Make `folder`/report.html from its summary and journals. Raises: RunError."""
    summary = _summary(folder)
    page = folder / "report.html"
    durable.write(
        page, render(summary, _journals(folder, summary), audit.read(folder), read_judged(folder)).encode()
    )
    return page


def write_partition(partition: Mapping[str, Any], file: Path) -> Path:
    """Make a page of who holds what alone, for a preview. Raises: RunError."""
    page = _page(
        "partition.html.j2",
        shown={p.key: p for p in pictures.partition(partition)},
        clients=len(partition["clients"]),
        distance=partition["distance"],
        by=partition["by"],
    )
    durable.write(file, page.encode())
    return file


def render(
    summary: Summary,
    journals: Journals,
    audited: Mapping[str, Any] | None = None,
    judgements: Sequence[Mapping[str, Any]] = (),
) -> str:
    metric = findings.main_metric(summary)
    seeds, names = findings.seeds(summary), findings.rows(summary)
    records = pictures.federated(journals)
    told = {} if audited is None else audit.pictures(audited)
    generated, own = summary.get("synthesis", {}), findings.own(summary)
    leaking = leakage.pictures(summary, journals)
    return _page(
        "page.html.j2",
        s=summary,
        names=names,
        verdict=[*findings.verdict(summary), *endings.notes(summary)],
        tiles=_tiles(summary),
        seeds=seeds,
        metric=metric,
        metrics=findings.metrics(summary),
        results=_table(summary, names),
        singles=_table(summary, findings.single_clients(summary), mark_best=False),
        hindsight=any(name.endswith(" best") for name in names),
        curves={f"leak_{m}": findings.metric_title(m) for m in findings.LEAKS if f"leak_{m}" in leaking},
        made=[synthesis.tally(label, own, found) for label, found in generated.items()],
        audit=None if audited is None else audit.shown(audited, summary["adapter_sha256"]),
        swept=len(leakage.private_shares(summary)) > 1,
        attacked=findings.leaks(summary),
        differences=_differences(summary),
        shown={**pictures.pictures(summary, journals), **leaking, **synthesis.pictures(summary), **told},
        participation=rounds.took_part([c["client"] for c in summary["partition"]["clients"]], records),
        samples=[_sample(s, summary, metric) for s in summary["samples"]],
        toml=tomli_w.dumps(summary["experiment"]),
        facts=_facts(summary),
        command=_command(summary),
        glossary=[m for key, m in findings.METRICS.items() if key in findings.metrics(summary)],
        own=own,
        labels=list(findings.methods(summary)),
        lower=LOWER,
        arrow=findings.arrow,
        metric_title=findings.metric_title,
        mixes=_own_mix(summary),
        judgements=[judged.shown(table, own) for table in judgements],
    )


# --- reading the folder ----------------------------------------------------------------------------------


def _summary(folder: Path) -> Summary:
    path = folder / "summary.json"
    command = "compare" if any(folder.glob("seed-*")) else "run"
    again = f"fedloom {command} --resume --out {folder}"
    try:
        summary = read_summary(folder)
    except (ValueError, OSError) as damage:
        raise RunError(
            f"{path} cannot be read: {type(damage).__name__}. The rounds it was made from are kept apart, "
            f"so delete it and have it made again: {again}"
        ) from damage
    if summary is None:
        raise RunError(f"{folder} has no summary.json, so it is no finished run. Finish it first: {again}")
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else None
        raise RunError(
            f"{path}: expected schema {SCHEMA}, found {found!r}. "
            "Use the version of fedloom that wrote it, or run the experiment again."
        )
    missing = [key for key in NEEDED if key not in summary] or ([] if summary["rows"] else ["rows"])
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}. Delete it and have it made again: {again}")
    return summary


def _journals(folder: Path, summary: Summary) -> Journals:
    """What is there of them: a page without curves is better than none."""
    if summary["kind"] == "compare":
        places = {row: row for row in ("federated", *findings.methods(summary), "centralised", "local_only")}
        places |= {label: method_folder(label) for label in findings.methods(summary)}
        found = {
            row: [
                journal.read(folder / f"seed-{seed}" / place / "metrics.jsonl")
                for seed in findings.seeds(summary)
            ]
            for row, place in places.items()
        }
    else:
        row = "federated" if "federated" in findings.rows(summary) else "local_only"
        found = {row: [journal.read(folder / "metrics.jsonl")]}
    kept = {row: [records for records in seeds if records] for row, seeds in found.items()}
    return {row: seeds for row, seeds in kept.items() if seeds}


def method_folder(label: str) -> str:
    """Where a comparison keeps what it trained for a method, under each seed."""
    return "method-" + label.lower().replace(" ", "-")


# --- the tables ------------------------------------------------------------------------------------------


def _table(summary: Summary, names: Sequence[str], *, mark_best: bool = True) -> list[dict[str, Any]]:
    metrics = findings.metrics(summary)
    winners = {m: findings.best(summary, names, m) if mark_best else set() for m in metrics}
    table = []
    for name in names:
        found = {m: findings.entry(summary, name, m) for m in metrics}
        cells = [
            {
                "value": findings.value(m, e["mean"] if e else None),
                "half": findings.half_width(m, e["ci95"]) if e else "",
                "best": name in winners[m],
            }
            for m, e in found.items()
        ]
        table.append(
            {
                "title": findings.title(name, findings.own(summary)),
                "model": findings.model(name),
                "colour": figures.colour(name, list(findings.methods(summary))),
                "cells": cells,
            }
        )
    return table


def _differences(summary: Summary) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """metric -> lines that concern the federated row, and the others; these are told apart where there are many."""
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
        reading = f"{findings.short(d['a'] if improves(metric, d['mean']) else d['b'])} is better"
    return {
        "a": findings.short(d["a"]),
        "b": findings.short(d["b"]),
        "mean": f"{findings.change(metric, d['mean'])} {findings.unit(metric)}".strip(),
        "interval": "–"
        if ci95 is None
        else f"{findings.change(metric, ci95[0])} to {findings.change(metric, ci95[1])}",
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


def _sample(sample: Mapping[str, Any], summary: Summary, metric: str) -> dict[str, Any]:
    """A question with the answers of the rows, the best single client among them; the other clients apart."""
    said = dict(sample["answers"])
    alone = [row for row in said if row.startswith(LOCAL)]
    first = {row: e["values"][0] for row in alone if (e := findings.entry(summary, row, metric)) is not None}
    top = next(
        (row for row, x in first.items() if not any(better(metric, y, x) for y in first.values())), None
    )
    order = ["base", top, *(row for row in said if row != "base" and not is_single(row))]
    order = [row for row in order if row is not None and row in said]
    labels, own = list(findings.methods(summary)), findings.own(summary)

    def answer(row: str) -> dict[str, Any]:
        named = f"Best single client ({row.removeprefix(LOCAL)})" if row == top else findings.title(row, own)
        if right := sample["right"]:
            mark = "✓ right" if right[row] else ""
        else:
            same = folded(said[row]) == folded(sample["reference"])
            mark = "✓ same as the reference" if same else ""
        return {"title": named, "text": said[row], "mark": mark, "colour": figures.colour(row, labels)}

    return {
        **sample,
        "shown": [answer(row) for row in order],
        "rest": [answer(row) for row in said if row not in order],
    }


def _own_mix(summary: Summary) -> dict[str, Any] | None:
    """How many clients gain, tie and lose by taking part, a line a seed and one of means; and what a tie is."""
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
        lines.append(["mean, 95% interval", *(findings.count(found[o], most=most) for o in OUTCOMES)])
    tie = "less than what one answer weighs" if metric in COUNTED else "a difference too small to be written"
    return {"metric": metric, "lines": lines, "tie": tie}


def _tiles(summary: Summary) -> list[tuple[str, str]]:
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
        *([("sent, both ways", findings.byte_size(sent))] if sent else []),
    ]


def _facts(summary: Summary) -> list[tuple[str, str]]:
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
        ("Time in rounds", findings.duration(seconds)),
        *((name, version) for name, version in summary["environment"].items()),
        *(
            (f"Reader: {key}", str(found))
            for key, found in summary["data"].items()
            if key not in ("test", "train")
        ),
    ]


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    """Who, when and from what; summaries of earlier versions do not say."""
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


def _command(summary: Summary) -> str:
    return f"fedloom {summary['kind']} experiment.toml --out {shlex.quote(summary['name'] + '-again')}"


# --- putting it together ---------------------------------------------------------------------------------


def _page(template: str, **values: Any) -> str:
    """A page with its style, its scripts and the policy that admits no others."""
    boot = _text("page.js")
    scripts = f"{bundle.admitted()} {_hash(boot)}"
    return (
        _environment()
        .get_template(template)
        .render(
            styles=_text("page.css"),
            boot=boot,
            packed=base64.b64encode(bundle.compressed()).decode(),
            policy=POLICY.format(scripts=scripts),
            **values,
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fedloom.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (resources.files("fedloom.report") / name).read_text("utf-8").replace("\r\n", "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
