from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.report import audit, page, readings
from fedloom.storage.files import AUDIT

Folder = Callable[..., Path]
Audit = dict[str, Any]


def text(folder: Path, audited: Audit | None) -> str:
    """Of the page, without its scripts and tags."""
    if audited is not None:
        (folder / AUDIT).write_text(json.dumps(audited))
    plain = re.sub(r"<script.*?</script>|<style.*?</style>", "", page.write(folder).read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", plain).split())


def lines(audited: Audit) -> dict[str, readings.Line]:
    return {
        line.measure: line for group in audit.shown(audited, "a" * 64)["groups"].values() for line in group
    }


def test_a_run_nobody_audited_says_how_to(run_folder: Folder) -> None:
    said = text(run_folder(), None)
    assert "fedloom audit RUN measures" in said
    assert "Release gate" not in said


def test_a_run_that_shares_no_model_is_not_told_to_be_audited(run_folder: Folder) -> None:
    assert "fedloom audit" not in text(run_folder(algorithm="local_only"), None)


def test_an_audit_is_a_section_of_the_page(run_folder: Folder, audited: Audit) -> None:
    said = text(run_folder(), audited)
    assert "Anyone with the adapter" in said
    assert "fedloom audit RUN measures" not in said


def test_an_audit_of_another_adapter_is_called_so(run_folder: Folder, audited: Audit) -> None:
    assert "of another adapter" in text(run_folder(), {**audited, "adapter_sha256": "c" * 64})
    assert "of another adapter" not in text(run_folder(), audited)


def test_a_leak_is_marked_where_chance_is_left_behind_and_nowhere_else(audited: Audit) -> None:
    assert {measure for measure, line in lines(audited).items() if line.clear} == {
        "Mean exposure of 4 planted secrets",
        "From its upload: client-000's 90 different tokens",
        "From the mean of 4 uploads alone: client-000's 90 different tokens",
    }


def test_exposure_stands_beside_that_of_secrets_never_planted_and_chance(audited: Audit) -> None:
    line = lines(audited)["Mean exposure of 4 planted secrets"]
    assert line.found == "5.42 bits"  # (6.5 + 7.0 + 3.2 + 5.0) / 4 = 5.425, rounded to even
    assert line.control == "never planted 1.23, by chance 1.44"  # (0.2 + 0.7 + 1.5 + 2.5) / 4


def test_the_score_that_tells_members_best_is_shown(audited: Audit) -> None:
    assert lines(audited)["Membership: AUC by loss against zlib's"].found == "0.55"


def test_without_planted_secrets_the_reason_is_shown_and_no_histogram(audited: Audit) -> None:
    audited["positions"]["public"]["exposure"] = {"reason": "none were planted"}
    assert lines(audited)["Exposure of planted secrets"].reading == "none were planted"
    assert set(audit.pictures(audited)) == {"aucs"}


def test_the_law_of_secrets_never_seen_is_drawn_and_adds_up(audited: Audit) -> None:
    figure = audit.pictures(audited)["exposures"].figure
    law = next(t for t in figure.data if t.type == "scatter")
    assert list(law.y[:3]) == [50.0, 25.0, 12.5]
    assert sum(law.y) == 100.0
    assert "1.44" in law.name


def test_every_secret_falls_into_one_bin(audited: Audit) -> None:
    bars = [t for t in audit.pictures(audited)["exposures"].figure.data if t.type == "bar"]
    assert [sum(t.y) for t in bars] == [100.0, 100.0]
    assert bars[0].y[-1] == 50.0  # 6.5, and 7.0, which is the ceiling itself


@pytest.mark.parametrize(("passed", "word"), [(True, "passed"), (False, "failed")])
def test_the_gate_is_told_in_words(run_folder: Folder, audited: Audit, passed: bool, word: str) -> None:
    gate = [{"measure": "exposure", "limit": 4.0, "value": 5.4, "passed": passed}]
    said = text(run_folder(), {**audited, "gate": gate, "passed": passed})
    assert f"Release gate: {word}." in said
    assert ("no proof of privacy" in said) == passed


@pytest.mark.parametrize("damage", [b"{", b"\xff", b"[]", b'{"schema": 2}'])
def test_a_damaged_audit_is_refused_with_what_to_do(run_folder: Folder, damage: bytes) -> None:
    folder = run_folder()
    (folder / AUDIT).write_bytes(damage)
    with pytest.raises(RunError, match=r"audit\.json.*fedloom audit"):
        page.write(folder)
