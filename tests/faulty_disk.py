"""A disk that fails at the n-th write operation inside one folder: full, or the machine dies there.

Operations are open for writing, write, fsync, rename, unlink and mkdir, whoever calls them. With "power",
a death also loses what was not yet fsynced: half of every such file, and renames whose folder was not.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

Mode = Literal["full", "killed", "power"]


class Killed(BaseException):
    """The process ends here: nothing of ours catches it."""


class FaultyDisk:
    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        fail_at: int | None = None,
        mode: Mode = "killed",
    ):
        self._folder = str(folder)
        self._fail_at = fail_at
        self._mode = mode
        self._dead = False
        self._unsynced: dict[str, int] = {}  # path -> how many of its bytes are safe
        self._renames: list[tuple[str, str, bytes | None]] = []  # from, to, what was there before
        self._made: list[str] = []  # folders
        self.operations: list[str] = []
        self._real: dict[str, Callable[..., Any]] = {
            "open": builtins.open,
            "replace": os.replace,
            "unlink": os.unlink,
            "mkdir": os.mkdir,
        }
        monkeypatch.setattr(builtins, "open", self._open)
        monkeypatch.setattr(io, "open", self._open)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "replace", self._replace)
        monkeypatch.setattr(os, "unlink", self._unlink)
        monkeypatch.setattr(os, "mkdir", self._mkdir)

    @classmethod
    @contextmanager
    def failing(cls, folder: Path, *, at: int | None, mode: Mode) -> Iterator[FaultyDisk]:
        with pytest.MonkeyPatch.context() as patch:
            yield cls(folder, patch, fail_at=at, mode=mode)

    def _ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _step(self, what: str, path: Any, halfway: Callable[[], object] = lambda: None) -> None:
        """One operation: goes through, or fails here; the dead do nothing more."""
        if self._dead:
            raise Killed
        self.operations.append(f"{what} {Path(path).name}")
        if len(self.operations) - 1 != self._fail_at:
            return
        halfway()
        if self._mode == "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self._dead = True
        if self._mode == "power":
            self._lose()
        raise Killed

    def _lose(self) -> None:
        for origin, target, before in reversed(self._renames):
            self._real["replace"](target, origin)
            if before is not None:
                self._put(target, before)
        renamed = {target: origin for origin, target, _ in self._renames}
        for path, safe in self._unsynced.items():
            path = renamed.get(path, path)
            if os.path.exists(path):
                with self._real["open"](path, "rb") as file:
                    data = file.read()
                self._put(path, data[: (safe + len(data)) // 2])
        for folder in self._made:
            shutil.rmtree(folder)

    def _put(self, path: str, data: bytes) -> None:
        with self._real["open"](path, "wb") as file:
            file.write(data)

    def _open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not self._ours(path) or not set(mode) & set("wax+"):
            return self._real["open"](path, mode, *args, **options)
        self._step("open", path)
        self._unsynced.setdefault(
            os.fspath(path), os.path.getsize(path) if "a" in mode and os.path.exists(path) else 0
        )
        if "b" not in mode:
            return self._real["open"](path, mode, *args, **options)
        return _File(self, os.fspath(path), self._real["open"](path, mode, buffering=0))

    def _fsync(self, handle: int) -> None:
        target = os.readlink(f"/proc/self/fd/{handle}")
        if not self._ours(target):
            return
        self._step("fsync", target)
        self._unsynced.pop(target, None)
        self._renames = [r for r in self._renames if os.path.dirname(r[1]) != target]
        self._made = [folder for folder in self._made if os.path.dirname(folder) != target]

    def _replace(self, origin: Any, target: Any, **options: Any) -> None:
        if self._ours(target):
            self._step("replace", target)
            origin, target = os.fspath(origin), os.fspath(target)
            before = None
            if os.path.isfile(target):
                with self._real["open"](target, "rb") as file:
                    before = file.read()
            self._renames.append((origin, target, before))
            if origin in self._unsynced:
                self._unsynced[target] = self._unsynced.pop(origin)
        self._real["replace"](origin, target, **options)

    def _unlink(self, path: Any, **options: Any) -> None:
        if self._ours(path):
            self._step("unlink", path)
        self._real["unlink"](path, **options)

    def _mkdir(self, path: Any, *args: Any, **options: Any) -> None:
        new = self._ours(path) and not os.path.exists(path)
        if new:
            self._step("mkdir", path)
        self._real["mkdir"](path, *args, **options)
        if new and os.fspath(path) != self._folder:
            self._made.append(os.fspath(path))

    def wrote(self, path: str, file: io.RawIOBase, data: bytes) -> None:
        self._step("write", path, halfway=lambda: file.write(data[: len(data) // 2]))


class _File:
    """Unbuffered, so that a death leaves exactly what was written."""

    def __init__(self, disk: FaultyDisk, path: str, file: io.RawIOBase):
        self._disk, self._path, self._file = disk, path, file

    def write(self, data: bytes) -> int:
        self._disk.wrote(self._path, self._file, data)
        return self._file.write(data) or 0

    def flush(self) -> None: ...

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
