"""metrics.jsonl: one line a round, never ahead of or behind the committed rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom import durable


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line. A partial last line, left by a crash, is not a line."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # damage inside the file: what follows cannot be trusted to be in order
    return records


def append(path: Path, record: Mapping[str, Any]) -> None:
    durable.append_line(path, json.dumps(record, allow_nan=False))


def align(path: Path, last: Mapping[str, Any] | None) -> None:
    """After a crash: cut the journal back to the committed round, or complete it with that round's line."""
    records = read(path)
    if last is None:
        kept: list[Mapping[str, Any]] = []
    else:
        kept = [r for r in records if r["round"] < last["round"]] + [last]
    durable.write(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept).encode())
