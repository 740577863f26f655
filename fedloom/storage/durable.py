"""Files that survive a crash: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.errors import RunError


def write(path: Path, data: bytes) -> None:
    """Temp file, flush, fsync, rename, fsync of the folder: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with _explained(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """One line at the end, on the disk when this returns. A crash may leave a partial last line."""
    with _explained(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failed:
        raise RunError(
            f"Could not write {path}: {failed.strerror or failed}. Everything committed before is intact; "
            "free some space or fix the permission, then go on with --resume."
        ) from failed
