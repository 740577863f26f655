"""What a run or a comparison found: rows of metrics, sample answers, and the summary made of them.

A row is one model on the held-out examples: "base", "federated", "centralised", or what `compare.methods`
calls a method; with a colon and the client's name where it is the model of a single client ("local:client-003").
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.data.sources import LICENCES
from fedloom.errors import RunError
from fedloom.evaluation.answers import answers_of, grade, right
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.loss import end_loss, held_out_loss
from fedloom.evaluation.own_mix import outcomes
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.settings import ALGORITHM, Experiment
from fedloom.state import AdapterState
from fedloom.statistics import estimate, paired
from fedloom.storage import durable

SCHEMA = 1
SAMPLES = 16  # held-out questions kept with everybody's answers, for the report
LOCAL = "local:"  # prefix of the rows of clients that train alone
JUDGED = "judged.json"  # of a comparison: the tables that a judge made of it
ANSWERS = "answers.jsonl"  # of a run or a seed: what its models answered, so that nothing is generated twice
LOWER = (
    "loss",
    "end_loss",
    "extraction",
    "exposure",
    "auc",
)  # metrics of which less is better; of an AUC its distance from 1/2
COIN = 0.5  # the AUC of a coin


def measure(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    rows: Mapping[str, AdapterState | None],
    leaks: Mapping[str, Mapping[str, float]] = {},
    *,
    cache: Cache,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every row on the same held-out examples: metrics, overall and by group, and a few answers.

    `leaks` are metrics of leakage that some rows have, too (leakage.py); answers are kept in `cache`. `say` hears what begins. Raises RunError for a row that has diverged.
    """
    groups = dataset.groups()
    say("measuring held-out loss")
    losses = held_out_loss(machine.engine, dataset.test, groups, rows)
    if diverged := [row for row in rows if not math.isfinite(losses[row].loss)]:
        raise RunError(
            f"The held-out loss of {diverged[0]!r} is no finite number: its training diverged. "
            "Start anew with a lower local.learning_rate."
        )
    asked = evenly(range(len(dataset.test)), experiment.evaluation.answers)
    questions = [dataset.test[i] for i in asked]
    limit = experiment.evaluation.max_new_tokens
    say(f"answering {len(asked)} question{'s' if len(asked) != 1 else ''} by {len(rows)} models")
    said = (
        answers_of(
            machine.engine,
            machine.template,
            questions,
            rows,
            weights=machine.base_hash,
            max_new_tokens=limit,
            cache=cache,
        )
        if asked
        else {}
    )
    ends = end_loss(machine.engine, machine.template, questions, rows) if asked else {}
    cut = sum(machine.template.prompt_cut(q, room=limit) != "none" for q in questions)
    measured: dict[str, Any] = {}
    for row in rows:
        overall = {"loss": losses[row].loss} | ({"end_loss": ends[row]} if row in ends else {})
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
            "answers": {row: said[row][j].text for row in rows},
            "right": {row: right(questions[j], said[row][j]) for row in rows} if questions[j].rule else None,
        }
        for j in evenly(range(len(asked)), SAMPLES)
    ]
    return {
        "seed": experiment.seed,
        "rows": measured,
        "samples": samples,
        "prompts_cut": cut,
        "mix": {c.client: dict(c.counts) for c in dataset.table.clients},
        "answered": dict(Counter(groups[i] for i in asked)),
    }


def evenly(items: Sequence[int], count: int | None) -> list[int]:
    """`count` of them at equal steps, or all: held-out examples lie group by group, so the mix is kept."""
    if count is None or count >= len(items):
        return list(items)
    return [items[int(i * len(items) / count)] for i in range(count)]


def is_single(row: str) -> bool:
    """Is this the model of a single client?"""
    return ":" in row


def is_specialist(row: str) -> bool:
    """Is this the model of an owner of a few categories (`compare.local`)?"""
    return row.startswith("Local-")


def shared(rows: Mapping[str, AdapterState | None]) -> dict[str, AdapterState | None]:
    """Without the models of single owners, which nobody else ever sees."""
    return {row: adapter for row, adapter in rows.items() if model_of(row) != "personal"}


def model_of(row: str) -> str:
    """Whose model a row is: "base", "global" (what all clients share), "personal", or "pooled" (of one owner of everything)."""
    if is_single(row) or is_specialist(row) or row.endswith((" mean", " best")):
        return "personal"
    return {"base": "base", "centralised": "pooled"}.get(row, "global")


def method_of(row: str, experiment: Experiment) -> str:
    """The algorithm that made it."""
    label = row.split(":")[0].removesuffix(" mean").removesuffix(" best").removesuffix(" personal")
    if label in experiment.compare.methods:
        return ALGORITHM.name(experiment.compare.methods[label])
    if is_specialist(row):
        return "fedavg"
    return {
        "federated": ALGORITHM.name(experiment.algorithm),
        "local": "local_only",
        "centralised": "fedavg",
    }.get(label, label)


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
        "own_mix": outcomes(results, shared="federated", alone=LOCAL, lower=LOWER),
        "groups": {row: part["groups"] for row, part in results[0]["rows"].items()},
        "samples": results[0]["samples"],
        "prompts_cut": sum(
            r.get("prompts_cut", 0) for r in results
        ),  # questions that models saw a part of, over all seeds
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


def better(metric: str, a: float, b: float) -> bool:
    """Is a the better value? Loss and leakage are better when lower, every other metric when higher."""
    return improves(metric, judged(metric, a) - judged(metric, b))


def judged(metric: str, x: float) -> float:
    """What of a value counts. An attack with an AUC below 1/2 tells as much as one above: whoever turns it round has that."""
    return abs(x - COIN) if metric == "auc" else x


def improves(metric: str, gap: float) -> bool:
    """Is a difference of judged values one for the better?"""
    return gap < 0 if metric in LOWER else gap > 0


def _best(metric: str, values: Sequence[float]) -> float:
    return (min if metric in LOWER else max)(values, key=partial(judged, metric))


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
        out[f"{label} best"] = {m: _best(m, [one[m] for one in every]) for m in found}
    return {**out, **{row: found for row, found in table.items() if is_single(row)}}


def _differences(
    tables: Sequence[Mapping[str, Mapping[str, float]]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Between the named rows (not single clients), each pair once, paired by seed; of AUCs, of their distances from 1/2."""
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
    """When, from which data and, where FEDLOOM_RUN_BY names one, by whom. Of paths the last part alone, since the rest
    says who ran it and where."""
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def read_judged(folder: Path) -> list[dict[str, Any]]:
    """The tables that judges made of this comparison's models, the latest last. Raises: RunError."""
    path = folder / JUDGED
    try:
        return list(json.loads(path.read_text("utf-8"))["tables"]) if path.exists() else []
    except (ValueError, KeyError, TypeError) as damage:
        raise RunError(
            f"{path} cannot be read: {type(damage).__name__}. Delete it and judge again: fedloom judge {folder}"
        ) from damage
