"""metrics.jsonl follows the committed rounds, whatever a crash left in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloom.storage import journal


def line(round: int, **more: Any) -> dict[str, Any]:
    return {"round": round, **more}


def written(path: Path, count: int) -> Path:
    for r in range(count):
        journal.append(path, line(r))
    return path


def rounds(path: Path) -> list[int]:
    return [r["round"] for r in journal.read(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_no_file_is_no_round(path: Path) -> None:
    assert journal.read(path) == []


def test_what_is_appended_is_read(path: Path) -> None:
    journal.append(path, line(0, loss=0.1, who=["a"]))
    assert journal.read(path) == [{"round": 0, "loss": 0.1, "who": ["a"]}]


def test_a_partial_last_line_is_not_a_line(path: Path) -> None:
    written(path, 3)
    whole = path.read_bytes()
    for cut in range(1, len(b'{"round": 2}\n')):
        path.write_bytes(whole[:-cut])
        assert rounds(path) == [0, 1]


def test_a_round_ahead_of_the_committed_one_is_cut(path: Path) -> None:
    assert journal.align(written(path, 4), line(1, loss=0.5)) == []
    assert journal.read(path) == [line(0), line(1, loss=0.5)]


def test_a_round_the_crash_left_out_is_completed(path: Path) -> None:
    assert journal.align(written(path, 2), line(2, loss=0.5)) == []
    assert journal.read(path) == [line(0), line(1), line(2, loss=0.5)]


def test_before_the_first_commit_nothing_is_kept(path: Path) -> None:
    assert journal.align(written(path, 2), None) == []
    assert path.read_bytes() == b""


def test_a_journal_that_was_deleted_is_begun_again_and_its_losses_are_named(path: Path) -> None:
    assert journal.align(path, line(2)) == [0, 1]
    assert rounds(path) == [2]


@pytest.mark.parametrize("damage", [b'{"round": 1', b"\xff\xfe", b"3", b"[]", b'{"loss": 1}', b""])
def test_a_damaged_line_is_named_and_costs_no_other(path: Path, damage: bytes) -> None:
    lines = written(path, 4).read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    assert rounds(path) == [0, 2, 3]
    assert journal.align(path, line(3)) == [1]


def test_a_value_that_json_lacks_is_refused_before_anything_is_written(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append(path, line(0, loss=float("nan")))
    assert not path.exists()
