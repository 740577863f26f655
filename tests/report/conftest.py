"""Folders as `run` and `compare` leave them, made from invented numbers by the code that makes real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.config import Experiment, parse
from fedloom.data import partition
from fedloom.data.example import Example
from fedloom.experiment import Dataset
from fedloom.results import summarise, write_json

KINDS = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)
SKILL = {"base": 0.08, "local": 0.27, "federated": 0.71, "centralised": 0.74}
ENGINE = {
    "path": "fast",
    "reason": "agrees with PEFT",
    "base_sha256": "b" * 64,
    "trained_parameters": 184320,
    "format": "plain",
}


def make_experiment(
    *, rounds: int, clients: int, algorithm: str = "fedavg", base: str = "embedded"
) -> Experiment:
    return parse(
        f'name = "invented"\nrounds = {rounds}\nalgorithm = "{algorithm}"\nmodel.base = "{base}"\n'
        f'data.clients = {clients}\ndata.partition = {{ kind = "shards", per_client = 2 }}',
        "invented",
    )


def make_dataset(
    clients: int, groups: tuple[str, ...] = KINDS, *, instruction: str = "Name two birds."
) -> Dataset:
    pool = [
        Example(instruction, "- dove\n- robin", category=groups[i % len(groups)]) for i in range(60 * clients)
    ]
    parts = partition.Shards(2)(pool, clients, 0)
    held = [
        Example(instruction, "- dove\n- robin", context="In a park.", category=g)
        for g in groups
        for _ in range(2)
    ]
    return Dataset(
        {c: [pool[i] for i in part] for c, part in parts.items()},
        held,
        partition.partition_table(pool, parts),
        "category",
    )


def make_result(
    dataset: Dataset,
    names: list[str],
    *,
    seed: int,
    metrics: tuple[str, ...],
    answer: str = "- dove\n- robin",
) -> dict[str, Any]:
    chance = random.Random(seed)

    def measured(row: str, group: str = "") -> dict[str, float]:
        skill = SKILL[row.partition(":")[0]] + chance.uniform(-0.05, 0.05)
        return {m: 4 - 3 * skill if m == "loss" else skill for m in ("loss", *metrics)}

    samples = [
        {
            "group": e.category,
            "instruction": e.instruction,
            "context": e.context,
            "reference": e.response,
            "answers": {
                n: answer if n in ("federated", "centralised") else "" if n == "base" else "- oak"
                for n in names
            },
            "right": None,
        }
        for e in dataset.test[:5]
    ]
    rows = {
        n: {"metrics": measured(n), "groups": {g: measured(n, g) for g in dict.fromkeys(dataset.groups())}}
        for n in names
    }
    return {"seed": seed, "rows": rows, "samples": samples}


def make_records(
    dataset: Dataset, *, rounds: int, cohort: int, seed: int, trained: bool = True
) -> list[dict[str, Any]]:
    chance, records = random.Random(seed), []
    for r in range(rounds + 1):
        chosen = sorted(chance.sample(sorted(dataset.clients), cohort)) if r else []
        refused = {chosen[0]: "non-finite"} if r == 2 and cohort > 1 else {}
        answered = [c for c in chosen if c not in refused]
        loss = 1.2 + 2.5 * 0.8**r + chance.uniform(-0.1, 0.1)
        records.append(
            {
                "round": r,
                "cohort": chosen,
                "refused": refused,
                "loss": loss if r else None,
                "clients": {
                    c: {"examples": len(dataset.clients[c]), "loss": loss, "steps": 8.0, "tokens": 900.0}
                    for c in answered
                },
                "bytes_up": 737280 * len(answered),
                "bytes_down": 737280 * len(chosen),
                "tokens": 900 * len(answered),
                "seconds": 1.25 * bool(r),
                "held_out": {"loss": loss + 0.2 if trained else 3.9, "groups": {}, "clients": {}},
                "adapter_sha256": "a" * 64,
            }
        )
    return records


def write_journal(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def compare_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(
        *,
        clients: int = 8,
        seeds: int = 5,
        rounds: int = 8,
        cohort: int | None = None,
        metrics: tuple[str, ...] = ("rule", "exact", "rouge_l"),
        groups: tuple[str, ...] = KINDS,
        instruction: str = "Name two birds.",
        answer: str = "- dove\n- robin",
        alone: int | None = None,
    ) -> Path:
        experiment, dataset = (
            make_experiment(rounds=rounds, clients=clients),
            make_dataset(clients, groups, instruction=instruction),
        )
        names = ["base", *(f"local:{c}" for c in list(dataset.clients)[:alone]), "federated", "centralised"]
        folder = tmp_path / "compared"
        for seed in range(seeds):
            for row, size in (("federated", cohort or clients), ("centralised", 1), ("local_only", clients)):
                write_journal(
                    folder / f"seed-{seed}" / row,
                    make_records(dataset, rounds=rounds, cohort=size, seed=seed, trained=row != "local_only"),
                )
        results = [make_result(dataset, names, seed=s, metrics=metrics, answer=answer) for s in range(seeds)]
        records = make_records(dataset, rounds=rounds, cohort=cohort or clients, seed=0)
        write_json(
            folder / "summary.json",
            summarise(
                "compare",
                experiment,
                dataset,
                results,
                records=records,
                adapter_sha256="a" * 64,
                engine=ENGINE,
            ),
        )
        return folder

    return make


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(
        *,
        algorithm: str = "fedavg",
        base: str = "embedded",
        metrics: tuple[str, ...] = ("rule", "exact", "rouge_l"),
        clients: int = 8,
    ) -> Path:
        experiment, dataset = (
            make_experiment(rounds=4, clients=clients, algorithm=algorithm, base=base),
            make_dataset(clients),
        )
        names = [
            "base",
            *(["federated"] if algorithm == "fedavg" else [f"local:{c}" for c in dataset.clients]),
        ]
        records = make_records(dataset, rounds=4, cohort=clients, seed=0, trained=algorithm == "fedavg")
        folder = tmp_path / "run"
        write_journal(folder, records)
        result = make_result(dataset, names, seed=0, metrics=metrics)
        write_json(
            folder / "summary.json",
            summarise(
                "run", experiment, dataset, [result], records=records, adapter_sha256="a" * 64, engine=ENGINE
            ),
        )
        return folder

    return make
