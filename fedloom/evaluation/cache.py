"""Stored replies: an append-only file of JSON lines, each under the hash of everything that determines it.

An interrupted evaluation continues where it stopped, and a repeated one asks nothing again. The files hold
answers to questions and judges' replies, so they belong to the owner of the test data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.storage import durable


def key_of(**parts: Any) -> str:
    """sha256 of named JSON values; equal for equal values, whatever the order of names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Cache:
    """A mapping from keys to JSON objects, on disk when `put` returns. `path` None: in memory only.

    Damaged lines, such as one half written in a crash, are skipped: their contents are asked for again. If a
    key appears twice, the first line counts.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            durable.append_line(path, "")  # or the next line would join half a line
        for line in data.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                self._kept.setdefault(record.pop("key"), record)

    def get(self, key: str) -> Mapping[str, Any] | None:
        return self._kept.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        self.put_all({key: record})

    def put_all(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Store several at once, with one wait for the disk."""
        if self._path is not None and records:
            lines = (json.dumps({"key": key, **record}, allow_nan=False) for key, record in records.items())
            durable.append_line(self._path, "\n".join(lines))
        self._kept.update({key: dict(record) for key, record in records.items()})
