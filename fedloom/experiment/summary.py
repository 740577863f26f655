"""Summarise measured rows: means and intervals over seeds, and the facts about the run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.data.sources import LICENCES
from fedloom.evaluation.metrics import best, judged
from fedloom.evaluation.own_mix import outcomes
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.settings import ALGORITHM, Experiment
from fedloom.rows import Row, is_single
from fedloom.statistics import estimate, paired
from fedloom.storage.files import SCHEMA


def method_of(row: Row, experiment: Experiment) -> str:
    """The algorithm that made this row."""
    if row.label in experiment.compare.methods:
        return ALGORITHM.name(experiment.compare.methods[row.label])
    if row.specialist:
        return "fedavg"
    own = ALGORITHM.name(experiment.algorithm)
    return {"federated": own, "local": "local_only", "centralised": "fedavg"}.get(row.label, row.label)


def summarise(
    kind: str,
    experiment: Experiment,
    dataset: Dataset,
    results: Sequence[Mapping[str, Any]],
    *,
    records: Sequence[Mapping[str, Any]],
    adapter_sha256: str,
    engine: Mapping[str, Any],
    when: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """summary.json: one result for each seed in, means and intervals out. See docs/files.md.

    `when`: when the experiment began and when it ended, in seconds since 1970.
    """
    tables = [_with_locals(r["rows"]) for r in results]
    names = [name for name in tables[0] if all(name in t for t in tables)]
    metrics = list(dict.fromkeys(metric for name in names for metric in tables[0][name]))
    rows = []
    for name in names:
        row = Row.parse(name)
        for metric in metrics:
            if any(metric not in t[name] for t in tables):
                continue
            found = estimate([t[name][metric] for t in tables])
            rows.append(
                {
                    "row": name,
                    "model": row.of,
                    "method": method_of(row, experiment),
                    "metric": metric,
                    "mean": found.mean,
                    "ci95": found.ci95,
                    "values": found.values,
                    "seeds": [r["seed"] for r in results],
                }
            )
    return {
        "schema": SCHEMA,
        "kind": kind,  # "run" or "compare"
        "name": experiment.name,
        "experiment": experiment.plain(),
        "rows": rows,
        "differences": _differences(tables, metrics),
        "own_mix": outcomes(results),
        "groups": {row: part["groups"] for row, part in results[0]["rows"].items()},
        "samples": results[0]["samples"],
        "prompts_cut": sum(
            r.get("prompts_cut", 0) for r in results
        ),  # questions that models saw only in part, over all seeds
        "synthesis": results[0].get("synthesis", {}),
        "rounds": [
            {k: r[k] for k in ("round", "bytes_up", "bytes_down", "tokens", "seconds")} for r in records
        ],
        "adapter_sha256": adapter_sha256,
        "partition": {
            "by": dataset.by,
            "distance": dataset.table.distance,
            "totals": dict(dataset.table.totals),
            "clients": [asdict(c) for c in dataset.table.clients],
        },
        "data": {"test": len(dataset.test), "train": sum(map(len, dataset.clients.values())), **dataset.read},
        "engine": dict(engine),
        "environment": environment(),
        "provenance": _provenance(experiment, dataset, when),
    }


def _with_locals(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by row; clients' rows become their mean and, metric by metric, their best, and come last."""
    table = {row: dict(found["metrics"]) for row, found in rows.items()}
    out: dict[str, dict[str, float]] = {}
    for name, found in table.items():
        row = Row.parse(name)
        if row.client is None:
            out[name] = found
            continue
        mean, top = row.over("mean"), row.over("best")
        if str(mean) in out:
            continue
        every = [
            its for other, its in table.items() if is_single(other) and Row.parse(other).over("mean") == mean
        ]
        out[str(mean)] = {m: fmean(one[m] for one in every) for m in found}
        out[str(top)] = {m: best(m, [one[m] for one in every]) for m in found}
    return {**out, **{name: found for name, found in table.items() if is_single(name)}}


def _differences(
    tables: Sequence[Mapping[str, Mapping[str, float]]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Differences between the named rows (not single clients), each pair once, paired by seed.

    For AUCs, the differences of their distances from 1/2.
    """
    names = [n for n in tables[0] if not is_single(n)]
    out = []
    for i, b in enumerate(names):
        for a in names[i + 1 :]:
            for metric in metrics:
                if any(metric not in t[row] for t in tables for row in (a, b)):
                    continue
                found = paired(*([judged(metric, t[row][metric]) for t in tables] for row in (a, b)))
                out.append(
                    {
                        "a": a,
                        "b": b,
                        "metric": metric,
                        "mean": found.estimate.mean,
                        "ci95": found.estimate.ci95,
                        "p_value": found.p_value,
                        "constant": found.constant,
                    }
                )
    return out


def environment() -> dict[str, str]:
    packages = ("fedloom", "torch", "transformers", "peft")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{p: version(p) for p in packages},
    }


def _provenance(experiment: Experiment, dataset: Dataset, when: tuple[float, float] | None) -> dict[str, Any]:
    """When it ran, on which data and, if FEDLOOM_RUN_BY is set, by whom.

    Only the last part of a path is kept: the rest would tell who ran it and where.
    """
    data = experiment.data
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    return {
        "by": os.environ.get("FEDLOOM_RUN_BY") or None,
        "started": None if when is None else _utc(when[0]),
        "finished": None if when is None else _utc(when[1]),
        "source": data.source,
        "files": [p if data.source == "hub" else Path(p).name for p in paths],
        "licence": LICENCES.get(data.source),
        "data_sha256": dataset.sha256(),
    }


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
