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
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs

from fedloom import durable, journal
from fedloom.errors import RunError
from fedloom.report import figures, findings
from fedloom.results import LOCAL, SCHEMA, better, read_summary

NEEDED = ("kind", "name", "experiment", "rows", "differences", "groups", "samples", "rounds", "adapter_sha256",
          "partition", "data", "engine", "environment")  # fmt: skip
CURVES = ("federated", "centralised", "local_only")

Summary = Mapping[str, Any]
Journals = dict[str, list[list[dict[str, Any]]]]  # row -> seeds -> records


def write(folder: Path) -> Path:
    """Make `folder`/report.html from its summary and journals. Raises: RunError."""
    summary = _summary(folder)
    page = folder / "report.html"
    durable.write(page, render(summary, _journals(folder, summary)).encode())
    return page


def render(summary: Summary, journals: Journals) -> str:
    styles, boot = _text("page.css"), _text("page.js")
    plotly = get_plotlyjs().replace("\r\n", "\n")  # a hash is taken of what the parser makes of it
    metric = findings.main_metric(summary)
    seeds, names = findings.seeds(summary), findings.rows(summary)
    federated = journals.get("federated") or journals.get("local_only") or []
    return _environment().get_template("page.html.j2").render(
        s=summary,
        styles=styles, plotly=plotly, boot=boot,
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {_hash(plotly)} {_hash(boot)}; "
               "base-uri 'none'; form-action 'none'",
        verdict=findings.verdict(summary),
        tiles=_tiles(summary),
        seeds=seeds,
        metric=metric,
        metrics=findings.metrics(summary),
        results=_table(summary, names),
        singles=_table(summary, findings.single_clients(summary), mark_best=False),
        hindsight="local best" in names,
        differences=_differences(summary),
        shown=_pictures(summary, journals, metric),
        participation=_took_part(summary, federated[0] if federated else []),
        samples=[_sample(s, summary, metric) for s in summary["samples"]],
        toml=tomli_w.dumps(summary["experiment"]),
        facts=_facts(summary),
        command=_command(summary),
        glossary=[m for key, m in findings.METRICS.items() if key in findings.metrics(summary)],
        title=findings.title, metric_title=findings.metric_title,
    )  # fmt: skip


# --- reading the folder ----------------------------------------------------------------------------------


def _summary(folder: Path) -> Summary:
    try:
        summary = read_summary(folder)
    except (ValueError, OSError) as damage:
        raise RunError(
            f"{folder / 'summary.json'} cannot be read ({type(damage).__name__}). It is made anew from the rounds, "
            f"which are kept apart: delete it, then fedloom {{run|compare}} --resume --out {folder}"
        ) from damage
    if summary is None:
        raise RunError(
            f"{folder} has no summary.json: it is no run, or one that is not finished. "
            f"Finish it first: fedloom {{run|compare}} --resume --out {folder}"
        )
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else None
        raise RunError(
            f"{folder / 'summary.json'}: expected schema {SCHEMA}, found {found!r}. "
            "Use the fedloom version that wrote it, or run the experiment again."
        )
    missing = [key for key in NEEDED if key not in summary]
    if missing or not summary["rows"]:
        raise RunError(
            f"{folder / 'summary.json'} lacks {', '.join(missing) or 'rows'}. Delete it and let it be made anew: "
            f"fedloom {{run|compare}} --resume --out {folder}"
        )
    return summary


def _journals(folder: Path, summary: Summary) -> Journals:
    """What is there of them: a page without curves is better than none."""
    if summary["kind"] == "compare":
        found = {
            row: [journal.read(folder / f"seed-{seed}" / row / "metrics.jsonl") for seed in findings.seeds(summary)]
            for row in CURVES
        }
    else:
        row = "local_only" if summary["experiment"]["algorithm"]["name"] == "local_only" else "federated"
        found = {row: [journal.read(folder / "metrics.jsonl")]}
    kept = {row: [records for records in seeds if records] for row, seeds in found.items()}
    return {row: seeds for row, seeds in kept.items() if seeds}


# --- the figures, each with the table it was made from ---------------------------------------------------


@dataclass(frozen=True)
class Picture:
    key: str
    label: str  # what a screen reader says in its place
    figure: str  # JSON, safe inside a script element
    head: Sequence[str] = ()
    body: Sequence[Sequence[Any]] = ()


def _picture(key: str, label: str, figure: go.Figure, head: Sequence[str] = (), body: Sequence[Sequence[Any]] = ()) -> Picture:
    return Picture(key, label, htmlsafe_json_dumps(figure.to_plotly_json()), head, body)


def _pictures(summary: Summary, journals: Journals, metric: str) -> dict[str, Picture]:
    partition = summary["partition"]
    shown = []
    if len(findings.seeds(summary)) > 1 or findings.single_clients(summary):  # else it shows less than the table
        shown.append(_picture("rows", f"{findings.metric_title(metric)} of every row; the table above holds the numbers.",
                              figures.rows_figure(summary)))  # fmt: skip
    groups = _by_group(summary, metric)
    if groups and any(groups.values()):
        labels = list(dict.fromkeys(g for found in groups.values() for g in found))
        body = [[findings.title(r), *(findings.value(metric, groups[r].get(g)) for g in labels)] for r in groups]
        shown.append(_picture("groups", f"{findings.metric_title(metric)} of every row in each {partition['by']}.",
                              figures.groups_figure(groups, metric), ["row", *labels], body))  # fmt: skip
    clients = _by_client(summary, metric)
    if clients:
        columns = list(dict.fromkeys(r for found in clients.values() for r in found))
        body = [[c, *(findings.value(metric, clients[c].get(r)) for r in columns)] for c in clients]
        head = ["client", *("This client alone" if r == "local_only" else findings.title(r) for r in columns)]
        shown.append(_picture("clients", f"{findings.metric_title(metric)} for each client in its own mix of data.",
                              figures.clients_figure(clients, metric), head, body))  # fmt: skip
    # Where nobody shares an adapter there is none to hold out against.
    shared = {row: seeds for row, seeds in journals.items() if row != "local_only"}
    if shared and any(figures.loss_curve(r, what="held_out") for seeds in shared.values() for r in seeds):
        shown.append(_losses("held_out", "Held-out loss by round.", shared))
    if journals:
        shown.append(_losses("train", "Training loss by round.", journals))
    head = ["client", "examples", *partition["totals"], "distance"]
    body = [[c["client"], c["size"], *(c["counts"].get(g, 0) for g in partition["totals"]), f"{c['distance']:.2f}"] for c in partition["clients"]]
    shown.append(_picture("partition", f"Training examples of each client by {partition['by']}.",
                          figures.partition_figure(partition), head, body))  # fmt: skip
    records = next(iter(journals.values()))[0] if journals else []
    if any(r["round"] > 0 for r in records):
        names = [c["client"] for c in partition["clients"]]
        body = [[n, *_counts(n, records)] for n in names]
        shown.append(_picture("participation", "Which clients took part in which round.", figures.participation_figure(names, records),
                              ["client", "selected", "took part", "refused"], body))  # fmt: skip
    if sum(r["bytes_up"] + r["bytes_down"] for r in summary["rounds"]):
        shown.append(_picture("bytes", "Bytes sent so far by round, in both directions.", figures.bytes_figure(summary["rounds"]),
                              ["round", "to the server", "to the clients", "tokens", "time"],
                              [[r["round"], findings.byte_size(r["bytes_up"]), findings.byte_size(r["bytes_down"]),
                                f"{r['tokens']:,}", findings.duration(r["seconds"])] for r in summary["rounds"]]))  # fmt: skip
    return {p.key: p for p in shown}


def _losses(what: Any, label: str, journals: Journals) -> Picture:
    means = {row: figures.mean_curve([figures.loss_curve(r, what=what) for r in seeds]) for row, seeds in journals.items()}
    means = {row: curve for row, curve in means.items() if curve}
    rounds = sorted({r for curve in means.values() for r in curve})
    body = [[r, *(findings.value("loss", means[row].get(r)) for row in means)] for r in rounds]
    return _picture(what, label, figures.loss_figure(journals, what=what), ["round", *map(figures.curve_title, means)], body)


def _by_group(summary: Summary, metric: str) -> dict[str, dict[str, float]]:
    """row -> group -> value in the first seed; the single clients as their mean, and each where they are few."""
    found = {row: {g: m[metric] for g, m in groups.items() if metric in m} for row, groups in summary["groups"].items()}
    local = {row: groups for row, groups in found.items() if row.startswith(LOCAL)}
    rest = {row: groups for row, groups in found.items() if row not in local}
    labels = list(dict.fromkeys(g for groups in local.values() for g in groups))
    mean = {g: fmean(groups[g] for groups in local.values() if g in groups) for g in labels}
    base = {"base": rest.pop("base")} if "base" in rest else {}
    each = local if len(local) <= figures.ROW_BY_ROW else {}
    return {**base, **each, **({"local mean": mean} if local else {}), **rest}


def _by_client(summary: Summary, metric: str) -> dict[str, dict[str, float]]:
    """client -> row -> value in the client's own mix of groups, in the first seed; clients tuned alone first of all."""
    groups = summary["groups"]
    tuned_alone = [c for c in summary["partition"]["clients"] if LOCAL + c["client"] in groups]
    table: dict[str, dict[str, float]] = {}
    for client in tuned_alone or summary["partition"]["clients"]:
        rows = {"base": "base", "local_only": LOCAL + client["client"], "federated": "federated", "centralised": "centralised"}
        held = {g: n for g, n in client["counts"].items() if n}
        values = {
            name: sum(n * groups[row][g][metric] for g, n in held.items()) / sum(held.values())
            for name, row in rows.items()
            if row in groups and all(metric in groups[row].get(g, {}) for g in held)
        }
        if len(values) > 1:
            table[client["client"]] = values
    return table


def _counts(client: str, records: Sequence[Mapping[str, Any]]) -> list[int]:
    did = [figures.part(r, client) for r in records if r["round"] > 0]
    return [len(did) - did.count("not selected"), did.count("took part"), did.count("refused")]


def _took_part(summary: Summary, records: Sequence[Mapping[str, Any]]) -> str:
    """Participation in one sentence."""
    counts = [_counts(c["client"], records) for c in summary["partition"]["clients"]]
    rounds = sum(r["round"] > 0 for r in records)
    if not rounds:
        return ""
    never, refused = sum(c[0] == 0 for c in counts), sum(c[2] for c in counts)
    everybody = all(c[1] == rounds for c in counts)
    said = (
        f"All {len(counts)} clients took part in all {rounds} rounds."
        if everybody
        else f"Over {rounds} rounds a client took part {fmean(c[1] for c in counts):.1f} times on average"
        + (f"; {never} of {len(counts)} were never selected." if never else ".")
    )
    return said + (f" {refused} {'updates were' if refused > 1 else 'update was'} refused." if refused else "")


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
        table.append({"row": name, "title": findings.title(name), "colour": _colour(name), "cells": cells})
    return table


def _colour(row: str) -> str:
    return figures.ROW_COLOURS.get("local_only" if row.startswith(LOCAL) else row, figures.ROW_COLOURS["base"])


def _differences(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """metric -> lines; what the federated row is compared with comes first."""
    table = {}
    for metric in findings.metrics(summary):
        lines = [d for d in summary["differences"] if d["metric"] == metric]
        table[metric] = [_difference(d, metric) for d in sorted(lines, key=lambda d: "federated" not in (d["a"], d["b"]))]
    return {metric: lines for metric, lines in table.items() if lines}


def _difference(d: Mapping[str, Any], metric: str) -> dict[str, Any]:
    ci95 = d["ci95"]
    clear = findings.excludes_zero(ci95)
    reading = "one seed: no interval" if ci95 is None else "not distinguishable"
    if clear:
        reading = f"{_short(d['a'] if better(metric, d['mean'], 0.0) else d['b'])} is better"
    return {
        "a": _short(d["a"]),
        "b": _short(d["b"]),
        "mean": f"{findings.change(metric, d['mean'])} {findings.unit(metric)}",
        "interval": "–" if ci95 is None else f"{findings.change(metric, ci95[0])} to {findings.change(metric, ci95[1])}",
        "p": "–" if d["p_value"] is None else "< 0.001" if d["p_value"] < 0.001 else f"{d['p_value']:.3f}",
        "reading": reading,
        "decided": clear,
    }


def _short(row: str) -> str:
    return findings.SHORT.get(row, row)


def _sample(sample: Mapping[str, Any], summary: Summary, metric: str) -> dict[str, Any]:
    """A question with the answers of the rows, the best single client among them; the other clients apart."""
    said = dict(sample["answers"])
    alone = [row for row in said if row.startswith(LOCAL)]
    first = {row: e["values"][0] for row in alone if (e := findings.entry(summary, row, metric)) is not None}
    top = next((row for row, x in first.items() if not any(better(metric, y, x) for y in first.values())), None)
    order = [row for row in ("base", top, "federated", "centralised") if row is not None and row in said]

    def answer(row: str) -> dict[str, Any]:
        named = f"Best single client ({row.removeprefix(LOCAL)})" if row == top else findings.title(row)
        same = " ".join(said[row].lower().split()) == " ".join(sample["reference"].lower().split())
        return {"title": named, "text": said[row], "same": same, "colour": _colour(row)}

    return {**sample, "shown": [answer(row) for row in order], "rest": [answer(row) for row in said if row not in order]}


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
        ("Base model", f"{summary['experiment']['model']['base']}"),
        ("Base model's sha256", str(engine["base_sha256"])),
        ("Adapter's sha256", summary["adapter_sha256"]),
        ("Prompt format", str(engine["format"])),
        ("Engine path", f"{engine['path']}: {engine['reason']}"),
        ("Tokens trained on", f"{tokens:,}{speed}"),
        ("Time in rounds", findings.duration(seconds)),
        *((name, version) for name, version in summary["environment"].items()),
        *((f"Reader: {key}", str(found)) for key, found in summary["data"].items() if key not in ("test", "train")),
    ]


def _command(summary: Summary) -> str:
    return f"fedloom {summary['kind']} experiment.toml --out {shlex.quote(summary['name'] + '-again')}"


# --- putting it together ---------------------------------------------------------------------------------


def _environment() -> Environment:
    return Environment(loader=PackageLoader("fedloom.report", ""), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)  # fmt: skip


def _text(name: str) -> str:
    return (resources.files("fedloom.report") / name).read_text("utf-8").replace("\r\n", "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
