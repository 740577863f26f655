"""What a run or a comparison found: rows of metrics, sample answers, and the summary made of them.

A row is one model on the held-out examples: "base", "federated", "centralised", or what `compare.methods`
calls a method; with a colon and the client's name where it is the model of a single client ("local:client-003").
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom import durable
from fedloom.config import Experiment
from fedloom.data import microworld
from fedloom.errors import RunError
from fedloom.evaluation.answers import answer, grade
from fedloom.evaluation.loss import held_out_loss
from fedloom.evaluation.statistics import estimate, paired
from fedloom.experiment import Dataset, Machine
from fedloom.state import AdapterState

SCHEMA = 1
SAMPLES = 16  # held-out questions kept with everybody's answers, for the report
LOCAL = "local:"  # prefix of the rows of clients that train alone
LOWER = ("loss", "extraction", "exposure", "auc")  # metrics of which less is better


def measure(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    rows: Mapping[str, AdapterState | None],
    leaks: Mapping[str, Mapping[str, float]] = {},
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every row on the same held-out examples: metrics, overall and by group, and a few answers.

    `leaks` are metrics of leakage that some rows have, too (leakage.py). `say` hears what begins. Raises RunError for a row that has diverged.
    """
    groups = dataset.groups()
    say("measuring held-out loss")
    losses = held_out_loss(machine.engine, dataset.test, groups, rows)
    if diverged := [row for row in rows if not math.isfinite(losses[row].loss)]:
        raise RunError(
            f"The held-out loss of {diverged[0]!r} is no finite number: its training diverged. "
            "Start anew with a lower local.learning_rate."
        )
    asked = _evenly(range(len(dataset.test)), experiment.evaluation.answers)
    questions = [dataset.test[i] for i in asked]
    limit = experiment.evaluation.max_new_tokens
    say(f"answering {len(asked)} question{'s' if len(asked) != 1 else ''} by {len(rows)} models")
    said = answer(machine.engine, machine.template, questions, rows, max_new_tokens=limit) if asked else {}
    measured: dict[str, Any] = {}
    for row in rows:
        overall = {"loss": losses[row].loss}
        within: dict[str, dict[str, float]] = {g: {"loss": loss} for g, loss in losses[row].groups.items()}
        if asked:
            overall |= grade(questions, said[row])
        for group in within:
            part = [j for j, i in enumerate(asked) if groups[i] == group]
            if part:
                within[group] |= grade([questions[j] for j in part], [said[row][j] for j in part])
        measured[row] = {"metrics": {**overall, **leaks.get(row, {})}, "groups": within}
    samples = [
        {
            "group": groups[asked[j]],
            "instruction": questions[j].instruction,
            "context": questions[j].context,
            "reference": questions[j].response,
            "answers": {row: said[row][j] for row in rows},
            "right": {row: microworld.check(questions[j], said[row][j]) for row in rows} if questions[j].rule else None,
        }
        for j in _evenly(range(len(asked)), SAMPLES)
    ]
    return {"seed": experiment.seed, "rows": measured, "samples": samples}


def _evenly(items: Sequence[int], count: int | None) -> list[int]:
    """`count` of them at equal steps, or all: held-out examples lie group by group, so the mix is kept."""
    if count is None or count >= len(items):
        return list(items)
    return [items[int(i * len(items) / count)] for i in range(count)]


def is_single(row: str) -> bool:
    """Is this the model of a single client?"""
    return ":" in row


def shared(rows: Mapping[str, AdapterState | None]) -> dict[str, AdapterState | None]:
    """Without the models of single clients, which nobody else ever sees."""
    return {row: adapter for row, adapter in rows.items() if not is_single(row)}


def model_of(row: str) -> str:
    """Whose model a row is: "base", "global" (what all clients share), "personal", or "pooled" (of one owner of everything)."""
    if is_single(row) or row.endswith((" mean", " best")):
        return "personal"
    return {"base": "base", "centralised": "pooled"}.get(row, "global")


def method_of(row: str, experiment: Experiment) -> str:
    """The algorithm that made it."""
    label = row.split(":")[0].removesuffix(" mean").removesuffix(" best").removesuffix(" personal")
    if label in experiment.compare.methods:
        return experiment.compare.methods[label].name
    return {"federated": experiment.algorithm.name, "local": "local_only", "centralised": "fedavg"}.get(label, label)


def summarise(
    kind: str,
    experiment: Experiment,
    dataset: Dataset,
    results: Sequence[Mapping[str, Any]],
    *,
    records: Sequence[Mapping[str, Any]],
    adapter_sha256: str,
    engine: Mapping[str, Any],
) -> dict[str, Any]:
    """summary.json: one result for each seed in, means and intervals out. See docs/files.md."""
    tables = [_with_locals(r["rows"]) for r in results]
    names = [name for name in tables[0] if all(name in t for t in tables)]
    metrics = list(dict.fromkeys(metric for name in names for metric in tables[0][name]))
    rows = []
    for name in names:
        for metric in metrics:
            if any(metric not in t[name] for t in tables):
                continue
            found = estimate([t[name][metric] for t in tables])
            rows.append(
                {
                    "row": name,
                    "model": model_of(name),
                    "method": method_of(name, experiment),
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
        "groups": {row: part["groups"] for row, part in results[0]["rows"].items()},
        "samples": results[0]["samples"],
        "synthesis": results[0].get("synthesis", {}),
        "rounds": [{k: r[k] for k in ("round", "bytes_up", "bytes_down", "tokens", "seconds")} for r in records],
        "adapter_sha256": adapter_sha256,
        "partition": {"by": dataset.by, "distance": dataset.table.distance, "totals": dict(dataset.table.totals),
                      "clients": [asdict(c) for c in dataset.table.clients]},
        "data": {"test": len(dataset.test), "train": sum(map(len, dataset.clients.values())), **dataset.read},
        "engine": dict(engine),
        "environment": environment(),
    }  # fmt: skip


def better(metric: str, a: float, b: float) -> bool:
    """Is a the better value? Loss and leakage are better when lower, every other metric when higher."""
    return a < b if metric in LOWER else a > b


def _with_locals(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by row, single clients summed up as their mean and, in each metric, their best; these alone come last."""
    table = {row: dict(found["metrics"]) for row, found in rows.items()}
    out: dict[str, dict[str, float]] = {}
    for row, found in table.items():
        if not is_single(row):
            out[row] = found
            continue
        label = row.split(":")[0]
        if f"{label} mean" in out:
            continue
        every = [other for name, other in table.items() if name.startswith(f"{label}:")]
        out[f"{label} mean"] = {m: fmean(one[m] for one in every) for m in found}
        out[f"{label} best"] = {m: (min if m in LOWER else max)(one[m] for one in every) for m in found}
    return {**out, **{row: found for row, found in table.items() if is_single(row)}}


def _differences(tables: Sequence[Mapping[str, Mapping[str, float]]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Between the named rows (not single clients), each pair once, paired by seed."""
    names = [n for n in tables[0] if not is_single(n)]
    out = []
    for i, b in enumerate(names):
        for a in names[i + 1 :]:
            for metric in metrics:
                if any(metric not in t[row] for t in tables for row in (a, b)):
                    continue
                found = paired([t[a][metric] for t in tables], [t[b][metric] for t in tables])
                out.append({"a": a, "b": b, "metric": metric, "mean": found.estimate.mean,
                            "ci95": found.estimate.ci95, "p_value": found.p_value})  # fmt: skip
    return out


def environment() -> dict[str, str]:
    packages = ("fedloom", "torch", "transformers", "peft")
    return {"python": platform.python_version(), "machine": platform.machine(), **{p: version(p) for p in packages}}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None

