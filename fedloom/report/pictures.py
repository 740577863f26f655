"""The figures that a page shows, each with an alternative text and the table it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from jinja2.utils import htmlsafe_json_dumps

from fedloom.evaluation.own_mix import in_mix
from fedloom.report import drawing, figures, round_figures, rounds
from fedloom.report.findings import Summary, entry, main_metric, methods, own, rows, seeds, single_clients
from fedloom.report.rounds import Record, What
from fedloom.report.terms import byte_size, duration, metric_title, title, value
from fedloom.rows import Row, is_single, local

Journals = Mapping[str, Sequence[Sequence[Record]]]  # row -> seeds -> records


@dataclass(frozen=True)
class Picture:
    key: str
    label: str  # text for screen readers
    figure: go.Figure
    head: Sequence[str] = ()
    body: Sequence[Sequence[str | int]] = ()

    @property
    def json(self) -> str:
        """The figure as JSON that is safe inside a script element."""
        return htmlsafe_json_dumps(self.figure.to_plotly_json())


def pictures(summary: Summary, journals: Journals) -> dict[str, Picture]:
    """Key -> picture, for every figure that this summary and its journals have data for."""
    made = (_rows, _groups, _clients, _partition, _bytes)
    return {p.key: p for p in (*(p for make in made for p in make(summary)), *_rounds(summary, journals))}


def federated(journals: Journals) -> Sequence[Record]:
    """The first seed's records of the row that the page is about; empty if the journal is lost."""
    of_row = journals.get("federated") or journals.get("local_only") or [()]
    return of_row[0]


def _rows(summary: Summary) -> Iterator[Picture]:
    if len(seeds(summary)) > 1 or single_clients(summary):  # otherwise it shows less than the table
        metric = main_metric(summary)
        label = f"{metric_title(metric)} of every row, with its seeds."
        lines = [
            e
            for row in (*rows(summary), *single_clients(summary))
            if (e := entry(summary, row, metric)) is not None
        ]
        head = ["row", "mean", "95% interval", *(f"seed {seed}" for seed in seeds(summary))]
        body = [
            [
                title(e["row"], own(summary)),
                value(metric, e["mean"]),
                " to ".join(value(metric, x) for x in e["ci95"] or ()) or "–",
                *(value(metric, x) for x in e["values"]),
            ]
            for e in lines
        ]
        yield Picture("rows", label, figures.rows_figure(summary), head, body)


def _groups(summary: Summary) -> Iterator[Picture]:
    metric, table = main_metric(summary), _by_group(summary)
    groups = list(dict.fromkeys(g for found in table.values() for g in found))
    if groups:
        label = f"{metric_title(metric)} of every row in each {summary['partition']['by']}."
        body = [
            [title(row, own(summary)), *(value(metric, found.get(g)) for g in groups)]
            for row, found in table.items()
        ]
        yield Picture(
            "groups", label, figures.groups_figure(table, metric, own=own(summary)), ["row", *groups], body
        )


def _by_group(summary: Summary) -> dict[str, dict[str, float]]:
    """row -> group -> value in the first seed; for single clients their mean, and each where they are few."""
    metric = main_metric(summary)
    table = {
        row: {g: found[metric] for g, found in groups.items() if metric in found}
        for row, groups in summary["groups"].items()
    }
    single = {row: table.pop(row) for row in list(table) if is_single(row)}
    base = {"base": table.pop("base")} if "base" in table else {}
    alone = {row: found for row, found in single.items() if Row.parse(row).alone}
    over: dict[str, list[Mapping[str, float]]] = {}  # mean -> the clients' rows
    for row, found in single.items():
        over.setdefault(str(Row.parse(row).over("mean")), []).append(found)
    means = {}
    for mean, its in over.items():
        groups = dict.fromkeys(g for found in its for g in found)
        means[mean] = {g: fmean(found[g] for found in its if g in found) for g in groups}
    return {**base, **(alone if len(alone) <= drawing.ROW_BY_ROW else {}), **means, **table}


def _clients(summary: Summary) -> Iterator[Picture]:
    metric, table = main_metric(summary), _by_client(summary)
    rows = list(dict.fromkeys(row for found in table.values() for row in found))
    if rows:
        label = f"{metric_title(metric)} for each client in its own mix of data."
        head = [
            "client",
            *("This client alone" if row == "local_only" else title(row, own(summary)) for row in rows),
        ]
        body = [[client, *(value(metric, found.get(row)) for row in rows)] for client, found in table.items()]
        yield Picture("clients", label, figures.clients_figure(table, metric, own=own(summary)), head, body)


def _by_client(summary: Summary) -> dict[str, dict[str, float]]:
    """client -> row -> value in the client's own mix of groups, in the first seed.

    If any clients were tuned alone, only those appear. A row without a value for one of the client's groups
    is left out: a mean over the others would be another mix.
    """
    metric, groups = main_metric(summary), summary["groups"]
    clients = summary["partition"]["clients"]
    table: dict[str, dict[str, float]] = {}
    for client in [c for c in clients if str(local(c["client"])) in groups] or clients:
        names = {"base": "base", "local_only": str(local(client["client"]))}
        names |= {"federated": "federated", "centralised": "centralised"}
        found = {
            row: x
            for row, name in names.items()
            if name in groups and (x := in_mix(groups[name], client["counts"], metric)) is not None
        }
        if len(found) > 1:
            table[client["client"]] = found
    return table


def _partition(summary: Summary) -> Iterator[Picture]:
    yield from partition(summary["partition"])


def partition(partition: Mapping[str, Any]) -> Iterator[Picture]:
    groups = list(partition["totals"])
    head = ["client", "examples", *groups, "distance"]
    body = [
        [c["client"], c["size"], *(c["counts"].get(g, 0) for g in groups), f"{c['distance']:.2f}"]
        for c in partition["clients"]
    ]
    label = f"Training examples of each client by {partition['by']}."
    yield Picture("partition", label, figures.partition_figure(partition), head, body)


def _bytes(summary: Summary) -> Iterator[Picture]:
    records = summary["rounds"]
    if any(r["bytes_up"] or r["bytes_down"] for r in records):
        head = ["round", "to the server", "to the clients", "tokens", "time"]
        body: list[list[str | int]] = [
            [
                r["round"],
                byte_size(r["bytes_up"]),
                byte_size(r["bytes_down"]),
                f"{r['tokens']:,}",
                duration(r["seconds"]),
            ]
            for r in records
        ]
        label = "Bytes sent so far by round, in both directions."
        yield Picture("bytes", label, round_figures.bytes_figure(records), head, body)


def _rounds(summary: Summary, journals: Journals) -> Iterator[Picture]:
    # Where no adapter is shared, there is none to measure on held-out examples.
    shared = {row: j for row, j in journals.items() if entry(summary, row, "loss") is not None}
    yield from _loss("held_out", "Held-out loss by round.", shared, summary)
    yield from _loss("train", "Training loss by round.", journals, summary)
    records = federated(journals)
    if any(r["round"] > 0 for r in records):
        clients = [c["client"] for c in summary["partition"]["clients"]]
        yield Picture(
            "participation",
            "Which clients took part in which round.",
            round_figures.participation_figure(clients, records),
            ["client", "selected", "took part", "refused"],
            [[client, *rounds.counts(client, records)] for client in clients],
        )


def _loss(what: What, label: str, journals: Journals, summary: Summary) -> Iterator[Picture]:
    curves = {row: [rounds.loss_curve(r, what=what) for r in of_seeds] for row, of_seeds in journals.items()}
    means = {row: mean for row, found in curves.items() if (mean := rounds.mean_curve(found))}
    if means:
        head = ["round", *(round_figures.curve_title(row, own(summary)) for row in means)]
        across = sorted({r for mean in means.values() for r in mean})
        body: list[list[str | int]] = [
            [r, *(value("loss", mean.get(r)) for mean in means.values())] for r in across
        ]
        labels = list(methods(summary))
        figure = round_figures.loss_figure(journals, what=what, own=own(summary), labels=labels)
        yield Picture(what, label, figure, head, body)
