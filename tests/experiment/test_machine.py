"""What computes: this process, or workers; how many of them, and that their number changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedloom.experiment import commands, machine
from fedloom.experiment.machine import load_here, load_machine, load_workers
from fedloom.experiment.settings import Experiment
from fedloom.experiment.toml import load
from tests.engine.test_pool import children, gone

TINY = [
    "model.base=random:llama",
    "data.examples=64",
    "data.hold_out=2",
    "data.clients=5",
    "rounds=2",
    "machine.clients_per_batch=2",
    "evaluation.answers=4",
    "evaluation.max_new_tokens=6",
]


def tiny(*overrides: str) -> Experiment:
    return load("quickstart", [*TINY, *overrides])


def files(folder: Path) -> dict[str, str]:
    """All that a run or comparison keeps of its trainings: states, memories, adapters, answers."""
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("answers.jsonl")]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(kept)}


def rows(summary: dict[str, Any]) -> Any:
    return [(row["row"], row["metric"], row["values"]) for row in summary["rows"]]


FEWFEDPIT = ["algorithm=fewfedpit", "rounds=1", "data.clients=3", "data.partition.per_client=3"]


@pytest.mark.parametrize("overrides", [[], FEWFEDPIT], ids=["FedIT", "FewFedPIT"])
def test_a_run_is_the_same_to_the_bit_with_any_number_of_workers(
    tmp_path: Path, overrides: list[str]
) -> None:
    found = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        summary = commands.run(tiny(f"machine.workers={workers}", *overrides), folder)
        assert summary["engine"]["workers"] == workers
        found[workers] = files(folder), rows(summary)
    assert found[1] == found[2]
    assert len(found[1][0]) > 3  # checkpoints, memories among them, and the adapter


def test_a_comparison_is_the_same_to_the_bit_with_any_number_of_workers(tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        summary = commands.compare(tiny("compare.seeds=2", f"machine.workers={workers}"), folder)
        found[workers] = files(folder), rows(summary)
    assert found[1] == found[2]


def test_the_number_of_workers_is_no_part_of_a_training() -> None:
    prints = {tiny(f"machine.workers={n}", f"machine.threads={n}").fingerprint() for n in (1, 2)}
    assert prints == {tiny().fingerprint()}


def test_workers_and_this_process_tell_the_same_facts() -> None:
    here, _ = load_here(tiny())
    with load_workers(tiny(), batches=1) as there:
        assert there.facts == here.facts
        assert there.initial_adapter(3).sha256() == here.initial_adapter(3).sha256()
        assert there.describe() == here.describe()


@pytest.mark.parametrize(
    ("wanted", "batches", "workers"),
    [("auto", 1, 1), ("auto", 3, 3), ("auto", 20, 4), (2, 20, 2), (8, 20, 8), (8, 3, 3), ("auto", 0, 1)],
)
def test_there_are_as_many_workers_as_cores_and_never_more_than_can_be_busy(
    monkeypatch: pytest.MonkeyPatch, wanted: int | str, batches: int, workers: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert machine.workers(tiny(f"machine.workers={wanted}"), batches=batches) == workers


@pytest.mark.parametrize(
    ("parameters", "workers", "threads"), [(10**6, 1, 1), (10**9, 1, 8), (10**9, 2, 4), (10**9, 16, 1)]
)
def test_only_large_models_share_their_products_among_threads(
    monkeypatch: pytest.MonkeyPatch, parameters: int, workers: int, threads: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.threads_of(tiny(), parameters, workers=workers) == threads
    assert machine.threads_of(tiny("machine.threads=3"), parameters, workers=workers) == 3


@pytest.mark.parametrize("said", ["2", "", "many"])
def test_OMP_NUM_THREADS_says_how_many_cores_there_are_to_use(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert machine.cores() == (2 if said == "2" else 3)


def test_one_batch_at_a_time_is_computed_in_this_process() -> None:
    with load_machine(tiny("machine.workers=4")) as alone:
        assert alone.engine.workers == 1
        assert not children(os.getpid())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_command(tmp_path: Path, command: str, end: signal.Signals) -> None:
    long = tiny("machine.workers=2", "rounds=500", "compare.seeds=2")
    file = tmp_path / "long.toml"
    file.write_text(long.to_toml(), "utf-8")
    words = [sys.executable, "-m", "fedloom", command, str(file), "--out", str(tmp_path / "x")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as parent:
        started: list[int] = []
        while not any((tmp_path / "x").rglob("metrics.jsonl")) or len(started) < 3:
            assert parent.poll() is None
            servers = children(parent.pid)
            started = [*servers, *(child for server in servers for child in children(server))]
            time.sleep(0.05)
        parent.send_signal(end)
        said = parent.communicate(timeout=60)[1]
    assert gone(started)
    if end == signal.SIGINT:
        assert parent.returncode == 130
        assert "Traceback" not in said
        assert "Every committed round is safe." in said


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_bit_of_a_run(tmp_path: Path) -> None:
    plain = tiny("machine.workers=1", "rounds=3", "evaluation.answers=0")
    expected = commands.run(plain, tmp_path / "whole")["adapter_sha256"]
    file = tmp_path / "same.toml"
    file.write_text(plain.with_(machine={"workers": 2, "clients_per_batch": 2}).to_toml(), "utf-8")
    words = [sys.executable, "-m", "fedloom", "run", str(file), "--out", str(tmp_path / "x")]
    killed = 0
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as parent:
        while parent.poll() is None and killed < 4:
            for worker in [child for server in children(parent.pid) for child in children(server)][:1]:
                os.kill(worker, signal.SIGKILL)
                killed += 1
            time.sleep(0.3)
    assert killed
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["adapter_sha256"] == expected
