"""A file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.storage import durable
from tests.faulty_disk import FaultyDisk, Killed, Mode

OPERATIONS = ["open .x.partial", "write .x.partial", "fsync .x.partial", "replace x", "fsync run"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "x"


def test_a_write_is_flushed_before_it_is_renamed_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk(path.parent, monkeypatch)
    durable.write(path, b"new")
    assert disk.operations == OPERATIONS
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("mode", ["full", "killed", "power"])
@pytest.mark.parametrize("n", range(len(OPERATIONS)), ids=OPERATIONS)
def test_after_any_failure_a_reader_sees_the_old_file_or_the_new(path: Path, mode: Mode, n: int) -> None:
    path.write_bytes(b"the old content")
    with FaultyDisk.failing(path.parent, at=n, mode=mode), pytest.raises((Killed, RunError)):
        durable.write(path, b"the new content")
    assert path.read_bytes() in (b"the old content", b"the new content")
    durable.write(path, b"again")
    assert path.read_bytes() == b"again"


@pytest.mark.parametrize("mode", ["full", "killed", "power"])
@pytest.mark.parametrize("n", range(3), ids=["open", "write", "fsync"])
def test_an_appended_line_costs_no_line_before_it(path: Path, mode: Mode, n: int) -> None:
    path.write_bytes(b"one\ntwo\n")
    with FaultyDisk.failing(path.parent, at=n, mode=mode), pytest.raises((Killed, RunError)):
        durable.append_line(path, "three")
    assert path.read_bytes().startswith(b"one\ntwo\n")


def test_a_full_disk_is_said_plainly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FaultyDisk(path.parent, monkeypatch, fail_at=1, mode="full")
    with pytest.raises(
        RunError, match=r"Could not write .*x: No space left on device\. .*intact; free some space.*--resume"
    ):
        durable.write(path, b"new")


def test_a_folder_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Could not write .*No such file"):
        durable.append_line(tmp_path / "gone" / "x", "line")


def test_a_leftover_of_a_crash_is_written_over(path: Path) -> None:
    path.with_name(".x.partial").write_bytes(b"half of something longer than the next")
    durable.write(path, b"new")
    assert [p.name for p in path.parent.iterdir()] == ["x"]
    assert path.read_bytes() == b"new"


def test_a_written_file_is_readable_like_any_other(path: Path) -> None:
    durable.write(path, b"new")
    (plain := path.with_name("y")).write_bytes(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
