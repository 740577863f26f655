"""A run's results are read back, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.storage.files import JUDGED, method, read_judged, read_summary


def test_no_summary_is_none(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None


def test_damaged_judgements_are_named_with_the_command_that_makes_them_again(tmp_path: Path) -> None:
    (tmp_path / JUDGED).write_text("[]")
    with pytest.raises(RunError, match=r"judged\.json cannot be read.*fedloom judge"):
        read_judged(tmp_path)


def test_methods_that_differ_by_blanks_and_capitals_share_a_folder_name() -> None:
    assert method("FedIT twice") == method("fedit-twice") == "method-fedit-twice"
