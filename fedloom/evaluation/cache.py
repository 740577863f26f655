"""Keep every answer and reply: an append-only file of JSON lines, each under the hash of all that determines it.

An interrupted evaluation goes on where it stopped, and a repeated one asks nothing again. The files hold
answers and judges' replies, so they belong to the owner of the test data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.storage import durable


def key_of(**parts: Any) -> str:
    """sha256 of named JSON values; equal for equal values, in whatever order they are named."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Cache:
    """A mapping from keys to JSON objects, on the disk as soon as `put` returns. `path` None: in memory only.

    Lines that are damaged, by a crash while the last was written or otherwise, are passed over: what they
    held is asked for again. Where a key appears twice, the first line counts.
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
            durable.append_line(path, "")  # or the next line would be glued to half a line
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
        """Several at once, with one wait for the disk."""
        if self._path is not None and records:
            lines = (json.dumps({"key": key, **record}, allow_nan=False) for key, record in records.items())
            durable.append_line(self._path, "\n".join(lines))
        self._kept.update({key: dict(record) for key, record in records.items()})
