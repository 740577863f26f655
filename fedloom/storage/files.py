"""The names of all files in a run's folder, and how its results are read. docs/files.md shows the whole folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.storage import durable

SCHEMA = 1  # of summary.json and judged.json

# A training, which is a run or a row of a comparison's seed.
EXPERIMENT = "experiment.toml"  # makes a folder a run
INPUTS = "inputs.json"  # hashes of the data, the base model and the prompts that a training began with
METRICS = "metrics.jsonl"  # the journal, a line a round
STATE = "state"  # the last committed rounds
ADAPTER = "adapter"
ANSWERS = "answers.jsonl"  # what models answered, so that nothing is generated twice
QUARANTINE = "quarantine.jsonl"  # records that could not be used
SUMMARY = "summary.json"  # marks it as finished
REPORT = "report.html"
CARD = "README.md"  # of an adapter

# A comparison has a folder for each seed, and each seed one for each row.
RESULT = "result.json"  # of one seed; written last
FEDERATED, CENTRALISED, LOCAL_ONLY = "federated", "centralised", "local_only"

# Made of a finished run afterwards.
EVALUATION = "evaluation.json"
AUDIT = "audit.json"
VERDICTS = Path("judge") / "verdicts.jsonl"  # all that judges said, so that nothing is asked twice
JUDGE = "judge.json"  # of a run: its answers against an opponent's
JUDGED = "judged.json"  # of a comparison: the tables that a judge made of it


def seed(number: int) -> str:
    return f"seed-{number}"


def method(label: str) -> str:
    """The folder of a method of `compare.methods`, under each seed."""
    return "method-" + label.lower().replace(" ", "-")


def home(run: Path, first: int) -> Path:
    """Where the released adapter was trained: the run itself, or the federated row of a comparison's first seed."""
    return run if (run / STATE).exists() else run / seed(first) / FEDERATED


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_summary(folder: Path) -> dict[str, Any] | None:
    """None of a run that is not finished."""
    path = folder / SUMMARY
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
