"""A run cannot be lost: killed, starved of disk or unplugged at any instant, it ends in the same adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.experiment import commands, preflight, summary
from fedloom.experiment.inputs import inputs_of
from fedloom.experiment.listener import Listener
from fedloom.experiment.toml import load
from fedloom.report import card, page
from fedloom.storage import checkpoint, durable
from tests.fakes import FOUR, NoFiles, ToyEngine, dataset, experiment, machine, skeleton, training
from tests.faulty_disk import FaultyDisk, Killed, Mode

TOY = experiment(
    adapter={"rank": 1}, data={"clients": 4}, cohort={"kind": "uniform", "count": 3}, examples_per_round=2
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs in milliseconds: everything but the model, the data, what people read and fsync is real."""
    monkeypatch.setattr(commands, "load_data", lambda *_, **__: dataset(FOUR))
    monkeypatch.setattr(commands, "load_machine", lambda *_, **__: machine(ToyEngine()))
    monkeypatch.setattr(commands, "_export_files", lambda *_: NoFiles())
    monkeypatch.setattr(commands, "load_skeleton", lambda _: skeleton())
    monkeypatch.setattr(page, "write", lambda folder: durable.write(folder / "report.html", b"a page"))
    monkeypatch.setattr(card, "model_card", lambda summary: "a card")
    monkeypatch.setattr(summary, "environment", dict)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Told(Listener):
    """The newest round that was said to be committed."""

    round = -1

    def committed(self, record: Mapping[str, Any]) -> None:
        self.round = record["round"]


def start_or_resume(folder: Path, listener: Listener = Listener()) -> dict[str, Any]:
    return commands.run(TOY, folder, resume=(folder / "experiment.toml").exists(), listener=listener)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for how long it took and what a crash left lying about."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for timed in (*lines, *summary["rounds"]):
        del timed["seconds"]
    for when in ("started", "finished"):
        summary["provenance"].pop(when, None)
    # A crash after the last commit may leave one older round in place, which nobody reads.
    rounds = sorted(folder.glob("state/round-*.safetensors"))[-2:]
    binary = [*folder.glob("adapter/*"), *rounds, folder / "experiment.toml"]
    return {
        "lines": lines,
        "summary": summary,
        "files": {p.name: p.read_bytes() for p in binary if not p.name.startswith(".")},
        "page": (folder / "report.html").exists(),
    }


@pytest.fixture
def expected(toy: None, tmp_path: Path) -> dict[str, Any]:
    start_or_resume(tmp_path / "whole")
    return outcome(tmp_path / "whole")


def operations(folder: Path) -> list[str]:
    with FaultyDisk.failing(folder, at=None, mode="killed") as disk:
        start_or_resume(folder)
    return disk.operations


def test_there_are_write_boundaries_in_every_part_of_a_run(toy: None, tmp_path: Path) -> None:
    seen = operations(tmp_path / "run")
    for part in (
        "mkdir run",
        "replace experiment.toml",
        "replace round-00000.safetensors",
        "replace round-00003.json",
        "fsync state",
        "unlink round-00001.json",
        "write metrics.jsonl",
        "write .adapter_model.safetensors.tmp",
        "replace adapter_config.json",
        "replace summary.json",
        "replace report.html",
    ):
        assert part in seen
    assert len(seen) > 90


@pytest.mark.parametrize("mode", ["full", "killed", "power"])
def test_every_write_boundary_may_fail_once(expected: dict[str, Any], tmp_path: Path, mode: Mode) -> None:
    count = len(operations(tmp_path / "count"))
    for n in range(count):
        folder = tmp_path / f"{n:03d}"
        failure, told = (OSError, RunError) if mode == "full" else Killed, Told()
        with FaultyDisk.failing(folder, at=n, mode=mode) as disk, pytest.raises(failure):
            start_or_resume(folder, told)
        where = f"{mode} at operation {n}, {disk.operations[n]}"
        found = checkpoint.newest(folder / "state", fingerprint=TOY.fingerprint()).checkpoint
        assert (found.state.round if found else -1) >= told.round, where
        start_or_resume(folder)
        assert outcome(folder) == expected, where


def test_every_second_boundary_may_fail_on_the_way_back(expected: dict[str, Any], tmp_path: Path) -> None:
    """A run that dies again and again, each time at a later point of what is left, still gets there."""
    folder, died = tmp_path / "run", 0
    for n in range(0, 400, 2):
        try:
            with FaultyDisk.failing(folder, at=n % 40, mode="killed"):
                start_or_resume(folder)
        except Killed:
            died += 1
        else:
            break
    assert died > 3
    assert outcome(folder) == expected


def test_a_disk_that_is_really_full_leaves_a_run_to_go_on_with(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)  # it fills up later
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        with pytest.raises(
            RunError, match=r"No space left on device\. Everything committed before is intact"
        ):
            start_or_resume(small / "run")
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        start_or_resume(small / "run")
        assert outcome(small / "run") == expected
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_crash_before_the_page_costs_no_page(toy: None, tmp_path: Path) -> None:
    start_or_resume(tmp_path)
    (tmp_path / "report.html").unlink()
    start_or_resume(tmp_path)
    assert (tmp_path / "report.html").exists()


def test_resuming_another_experiment_is_refused(toy: None, tmp_path: Path) -> None:
    start_or_resume(tmp_path)
    with pytest.raises(RunError, match="of another training: seed differs"):
        commands.run(TOY.with_(seed=1), tmp_path, resume=True)


def test_a_folder_with_a_run_is_not_started_over(toy: None, tmp_path: Path) -> None:
    start_or_resume(tmp_path)
    with pytest.raises(RunError, match="already holds a run"):
        commands.run(TOY, tmp_path)


# --- real processes ------------------------------------------------------------------------------------------

TINY = [
    "model.base=random:llama",
    "rounds=99999",
    "adapter.rank=1",
    "data.examples=32",
    "data.clients=2",
    "data.hold_out=1",
    "evaluation.answers=0",
    "evaluation.every=100000",
    "examples_per_round=1",
]


def fedloom(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    # A suite that was started in the background ignores SIGINT, and what it starts would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom", *arguments], text=True, stderr=subprocess.PIPE, **options
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_plainly_and_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    with fedloom("run", *TINY, "--out", str(tmp_path / "run")) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 2/"):
                process.send_signal(number)
                break
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "Every committed round is safe. Go on with it: fedloom run --resume --out" in said
    assert "fedloom: Interrupted." in said
    found = checkpoint.newest(tmp_path / "run" / "state", fingerprint=load(tmp_path / "run").fingerprint())
    assert found.checkpoint is not None
    assert found.checkpoint.state.round >= 2


def test_killed_runs_end_in_the_adapter_of_the_undisturbed_one() -> None:
    script = Path(__file__).parents[1] / "scripts" / "crash_test.py"
    command = [sys.executable, str(script), "--runs", "4", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 identical" in done.stdout


@pytest.mark.parametrize(
    ("key", "what"),
    [("data_sha256", "data are"), ("base_sha256", "base model is"), ("prompt_sha256", "prompts' format is")],
)
def test_a_run_does_not_go_on_with_other_inputs(key: str, what: str, tmp_path: Path) -> None:
    begun = training(tmp_path).training
    begun.finish(Listener())
    other = replace(begun, inputs={**begun.inputs, key: "1" * 64})
    with pytest.raises(RunError, match=f"{what} not what this run began with"):
        other.finish(Listener())
    training(tmp_path).finish(Listener())  # the same again is welcome


def test_inputs_name_data_base_and_prompts() -> None:
    data, its = dataset(FOUR), machine()
    clock = SimpleNamespace(sha256=lambda: "2" * 64)  # a chat template that tells the time, say
    others = inputs_of(dataset({**FOUR, "c": (6.5,)}), its), inputs_of(data, replace(its, template=clock))  # type: ignore[arg-type]
    changed = [{k for k, v in inputs_of(data, its).items() if other[k] != v} for other in others]
    assert changed == [{"data_sha256"}, {"prompt_sha256"}]
