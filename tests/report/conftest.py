"""Folders as `run` and `compare` leave them, made from invented numbers by the code that makes real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.data import partition
from fedloom.data.example import Example
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.settings import Experiment
from fedloom.experiment.summary import summarise
from fedloom.experiment.toml import parse
from fedloom.storage.files import write_json

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
                    c: {"weight": len(dataset.clients[c]), "loss": loss, "steps": 8.0, "tokens": 900.0}
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


METHODS = """
[compare.methods]
"FedIT" = "fedavg"
"FedPIT v1" = "fedpit"
"Few 0.2" = { name = "fewfedpit", private_share = 0.2 }
"LocIT+SA" = "self_augmented"
[algorithm]
name = "fewfedpit"
private_share = 0.6
"""
LEAKAGE = {
    "base": (1.4, 0.15, 0.5),
    "FedIT": (4.0, 0.5, 0.7),
    "FedPIT v1": (3.0, 0.4, 0.6),
    "Few 0.2": (2.0, 0.3, 0.6),
    "federated": (2.5, 0.35, 0.6),
    "centralised": (6.0, 0.7, 0.8),
}
SYNTHESIS = {
    "federated": {
        "counts": {"generated": 10, "kept": 6, "filtered/verbatim": 3, "failed/empty": 1, "repeated": 2},
        "samples": {
            "kept": [
                {
                    "client": "client-000",
                    "index": 0,
                    "instruction": "Name a fish.",
                    "context": "",
                    "response": "A cod.",
                }
            ],
            "filtered/verbatim": [
                {
                    "client": "client-001",
                    "index": 3,
                    "instruction": "<b>Say</b> it.",
                    "context": "Here.",
                    "response": "Word.",
                }
            ],
        },
    }
}


@pytest.fixture
def methods_folder(tmp_path: Path) -> Callable[..., Path]:
    """A comparison of every kind of row: shared and personal models, leakage, leakage by round, synthesis."""

    def make(*, seeds: int = 3, rounds: int = 4, leakage: bool = True) -> Path:
        dataset = make_dataset(4)
        experiment = parse(f'name = "invented"\nrounds = {rounds}\ndata.clients = 4\n{METHODS}', "invented")
        singles = ("local", "FedPIT v1 personal", "LocIT+SA")
        names = ["base", *(f"{s}:{c}" for s in singles for c in dataset.clients), *list(LEAKAGE)[1:]]
        folder, results = tmp_path / "methods", []
        for seed in range(seeds):
            chance = random.Random(seed)
            rows: dict[str, Any] = {}
            for i, name in enumerate(names):
                skill = 0.1 + 0.6 * i / len(names) + chance.uniform(-0.02, 0.02)
                metrics = {"loss": 4 - 3 * skill, "rule": skill, "exact": skill / 2, "rouge_l": skill}
                if leakage and name in LEAKAGE:
                    for metric, x in zip(("exposure", "extraction", "auc"), LEAKAGE[name], strict=True):
                        metrics[metric] = x + chance.uniform(-0.04, 0.04)
                rows[name] = {"metrics": metrics, "groups": {KINDS[0]: {"rule": skill}}}
            results.append({"seed": seed, "rows": rows, "samples": [], "synthesis": SYNTHESIS})
            for place in ("federated", "centralised", "local_only", "method-fedit", "method-few-0.2"):
                records = make_records(dataset, rounds=rounds, cohort=4, seed=seed)
                for r in records:
                    told = {
                        "exposure": 1.4 + r["round"] / 2 + chance.uniform(-0.1, 0.1),
                        "extraction": 0.2,
                        "auc": 0.5,
                    }
                    r["leakage"] = told if leakage and place != "local_only" else None
                write_journal(folder / f"seed-{seed}" / place, records)
        records = make_records(dataset, rounds=rounds, cohort=4, seed=0)
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
def audited() -> dict[str, Any]:
    """As `fedloom audit` writes it, of a model that leaks planted secrets and nothing else."""

    def share(hits: int, of: int) -> dict[str, Any]:
        return {
            "hits": hits,
            "of": of,
            "value": hits / of,
            "ci95": [max(0.0, hits / of - 0.2), min(1.0, hits / of + 0.2)],
        }

    def group(mean: float) -> dict[str, Any]:
        return {"rouge_l": {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}}

    def separation(auc: float) -> dict[str, Any]:
        return {"auc": auc, "auc_ci95": [auc - 0.1, auc + 0.1], "at": [{"target": 0.01, "tpr": share(1, 16)}]}

    def exposed(bits: list[float], p: float) -> dict[str, Any]:
        return {"bits": bits, "mean": sum(bits) / len(bits), "p_value": p}

    extraction = {
        row: {
            "members": group(x),
            "held_out": group(0.2),
            "memorised": {"mean": x - 0.2, "ci95": [x - 0.4, x]},
        }
        for row, x in (("base", 0.2), ("released", 0.3))
    }
    scores = ("loss", "reference", "zlib", "min_k", "min_k_plus")
    level = {"n": 1, "p": 0.5, "share": share(0, 6)}
    suffixes = {side: {"extractable": [level]} for side in ("members", "held_out")}
    told = {
        "inversion": {
            "recall": 0.3,
            "chance": 0.02,
            "chance_sd": 0.01,
            "tokens": 90,
            "ci95": [0.25, 0.4],
            "held_out": share(1, 40),
        },
        "membership": separation(0.55),
    }
    extracted = {"client-000": {"coverage": share(0, 6), "decoys": share(0, 8)}}
    return {
        "schema": 1,
        "name": "invented",
        "adapter_sha256": "a" * 64,
        "targets": {"members": 16, "held_out": 16, "canaries": 4, "twins": 4, "references": 128},
        "positions": {
            "public": {
                "extraction": extraction,
                "discoverable": {"base": suffixes, "released": suffixes},
                "ranking": {"base": {"all": share(0, 64)}, "released": {"all": share(0, 64)}},
                "membership": {
                    row: {s: separation(0.5 + 0.05 * (s == best)) for s in scores}
                    for row, best in (("base", ""), ("released", "zlib"))
                },
                "exposure": {
                    "released": {
                        "calibrated": {
                            "planted": exposed([6.5, 7.0, 3.2, 5.0], 0.0001),
                            "held_out": exposed([0.2, 0.7, 1.5, 2.5], 0.6),
                            "ceiling": 7.0,
                            "leaks": True,
                        },
                        "loss": {"planted": exposed([4.5, 6.0, 2.2, 4.0], 0.001)},
                    },
                    "base": {"loss": {"planted": exposed([0.5, 1.0, 1.5, 2.0], 0.4)}},
                    "by_copies": [{"copies": 2, "canaries": 4, "mean": 5.4, "p_value": 0.0001}],
                },
            },
            "client": {"cross_client": {"base": extracted, "released": extracted}},
            "server": {"client": "client-000", **told, "aggregated": {"clients": 4, **told}},
        },
        "synthesis": {"reason": "no client keeps synthetic examples"},
        "one_run": {"epsilon": 0.0, "correct": 2, "guesses": 2},
        "gate": [],
        "passed": None,
    }


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
