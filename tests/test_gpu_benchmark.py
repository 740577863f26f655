from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import gpu, packed_trainer


@pytest.fixture
def findings(tmp_path):
    return gpu.Findings(tmp_path, {})


def test_a_part_that_takes_too_long_is_left_out_and_the_next_one_runs(findings, tmp_path):
    assert findings.part("B7", "slow", 0.05, lambda: time.sleep(5)) is None
    assert findings.part("B7", "quick", 5, lambda: 3) == 3
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept == {"missing": {"B7, slow": "no time was left"}, "B7": {"quick": 3}}


def test_a_part_that_fails_is_named_with_its_reason(findings):
    findings.part("B7", "broken", 5, lambda: 1 / 0)
    assert findings.found["missing"] == {"B7, broken": "ZeroDivisionError: division by zero"}


def test_once_the_time_is_up_nothing_is_begun(findings, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    begun = []
    findings.part("B8", "late", 5, lambda: begun.append(1))
    assert begun == []
    assert "B8, late" in findings.found["missing"]


def test_a_packed_trainer_does_the_same_work():
    """In float32 what it learns is what fedloom learns, and it runs no padding."""
    work = gpu.Work.of(gpu.TINY, "cpu")
    figures = work.beside(work.packed(liger=False), gpu.TINY, torch.float32, 1e-3)
    assert figures["padding"] == 0.0
    assert figures["relative_difference"] < 1e-3
    assert not packed_trainer.has_liger() or torch.cuda.is_available()


def test_a_tiny_copy_of_b7_and_b8_misses_nothing(findings):
    gpu.tuning(findings, gpu.Work.of(gpu.TINY, "cpu"), repeats=1)
    gpu.answering(findings, gpu.TINY, 3, device="cpu", repeats=1)
    assert "missing" not in findings.found
    assert set(findings.found["B7"]) >= {gpu.FEDLOOM, gpu.IN_8_BITS, gpu.LIKE_SHEPHERD, packed_trainer.PLAIN}
    assert 0 < findings.found["B7"][gpu.IN_8_BITS]["relative_difference_to_bfloat16"] < 0.5
    assert findings.found["B8"]["fedloom"] > 0
