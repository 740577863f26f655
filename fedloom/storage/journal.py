"""metrics.jsonl: one line a round, never ahead of or behind the committed rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.storage import durable


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line. A partial last line, left by a crash, is skipped, and so is a damaged line."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "round" in record:
            records.append(record)
    return records


def append(path: Path, record: Mapping[str, Any]) -> None:
    durable.append_line(path, json.dumps(record, allow_nan=False))


def align(path: Path, last: Mapping[str, Any] | None) -> list[int]:
    """After a crash: cut the journal back to the committed round, or complete it with that round's line.

    Returns the earlier rounds whose lines are lost; a crash alone loses none.
    """
    kept: list[Mapping[str, Any]] = []
    if last is not None:
        kept = [r for r in read(path) if r["round"] < last["round"]] + [last]
    durable.write(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept).encode())
    return [] if last is None else sorted(set(range(last["round"])) - {r["round"] for r in kept})


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The values for JSON, which has no NaN: None in place of NaN and infinity."""
    return {
        name: None if value is None or not math.isfinite(value) else value for name, value in values.items()
    }
