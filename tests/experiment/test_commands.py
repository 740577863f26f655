"""The Python face of `fedloom run`: what it returns, what it leaves, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom.engine.peft_format import load_adapter
from fedloom.errors import ModelError, RunError, ShapeMismatch
from fedloom.experiment import commands, summary
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import load_machine
from fedloom.experiment.toml import load
from fedloom.federation import Round
from fedloom.report import card, page
from tests.fakes import FOUR, NoFiles, ToyEngine, dataset, experiment, machine, skeleton

TOY = experiment(adapter={"rank": 1})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load_data", lambda *_, **__: dataset(FOUR))
    monkeypatch.setattr(commands, "load_machine", lambda *_, **__: machine(ToyEngine()))
    monkeypatch.setattr(commands, "load_skeleton", lambda _: skeleton())
    monkeypatch.setattr(commands, "_export_files", lambda *_: NoFiles())
    monkeypatch.setattr(page, "write", lambda folder: (folder / "report.html").write_text("a page"))
    monkeypatch.setattr(card, "model_card", lambda summary, **_: "a card")
    monkeypatch.setattr(summary, "environment", dict)


def test_a_run_returns_what_its_summary_holds(toy: None, tmp_path: Path) -> None:
    summary = commands.run(TOY, tmp_path)
    assert json.loads(json.dumps(summary)) == json.loads((tmp_path / "summary.json").read_text())
    assert commands.run(TOY, tmp_path, resume=True) == json.loads((tmp_path / "summary.json").read_text())


def test_the_saved_experiment_is_the_one_that_ran(toy: None, tmp_path: Path) -> None:
    commands.run(TOY, tmp_path)
    assert load(tmp_path).fingerprint() == TOY.fingerprint()


def test_the_exported_adapter_is_that_of_the_last_round(toy: None, tmp_path: Path) -> None:
    summary = commands.run(TOY, tmp_path)
    adapter, _ = load_adapter(tmp_path / "adapter")
    assert adapter.sha256() == summary["adapter_sha256"]


def test_local_only_tuning_has_a_row_for_every_client_and_none_for_the_server(
    toy: None, tmp_path: Path
) -> None:
    summary = commands.run(TOY.with_(algorithm="local_only"), tmp_path)
    names = list(dict.fromkeys(r["row"] for r in summary["rows"]))
    assert names == ["base", "local mean", "local best", "local:a", "local:b", "local:c", "local:d"]


def test_a_listener_hears_the_run_in_order(toy: None, tmp_path: Path) -> None:
    heard: list[Any] = []

    class Ear(Listener):
        def started(self, *, rounds: int, completed: int, cohort: float) -> None:
            heard.append(("started", rounds, completed, cohort))

        def updated(self, round: Round, client: str) -> None:
            heard.append(client)

        def committed(self, record: Mapping[str, Any]) -> None:
            heard.append(record["round"])

    commands.run(TOY.with_(rounds=2), tmp_path, listener=Ear())
    assert heard == [("started", 2, 0, 4.0), *"abcd", 1, *"abcd", 2]


def test_refused_clients_are_in_the_journal(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        commands, "load_machine", lambda *_, **__: machine(ToyEngine(poison={"b": float("nan")}))
    )
    commands.run(TOY.with_(rounds=1), tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["refused"] == {"b": "non-finite"}
    assert sorted(last["clients"]) == ["a", "c", "d"]
    assert last["bytes_up"] > 0


def test_the_loss_of_a_round_weighs_clients_by_their_examples(toy: None, tmp_path: Path) -> None:
    commands.run(TOY.with_(rounds=1), tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    weighed = sum(c["weight"] * c["loss"] for c in last["clients"].values()) / 10
    assert last["loss"] == pytest.approx(weighed)
    assert {c: found["weight"] for c, found in last["clients"].items()} == {
        c: len(xs) for c, xs in FOUR.items()
    }


def test_held_out_loss_is_taken_every_few_rounds_and_at_both_ends(toy: None, tmp_path: Path) -> None:
    commands.run(TOY.with_(rounds=5, evaluation={"every": 2, "answers": 0}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["held_out"]] == [0, 2, 4, 5]


def test_a_client_is_told_its_loss_in_its_own_mix(toy: None, tmp_path: Path) -> None:
    commands.run(TOY.with_(rounds=1), tmp_path)
    held = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]
    low, high = held["groups"]["low"], held["groups"]["high"]
    assert held["clients"]["a"] == low  # 1, 2 and 3
    assert held["clients"]["b"] == pytest.approx((low + high) / 2)  # 4 and 5


def test_an_adapter_of_another_model_is_refused(toy: None, tmp_path: Path) -> None:
    commands.run(TOY, tmp_path)
    other = load_machine(load("quickstart", ["model.base=random:llama"]))
    with pytest.raises((ModelError, ShapeMismatch)):
        commands.adapter_of(tmp_path, other)


def test_a_run_without_an_adapter_says_how_to_finish_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no adapter yet\. Finish it first: fedloom run --resume --out"):
        commands.adapter_of(tmp_path, machine())


def test_a_comparison_is_not_resumed_as_a_run_nor_a_run_as_a_comparison(toy: None, tmp_path: Path) -> None:
    for folder, inside, resume in (("a", "seed-0", commands.run), ("b", "state", commands.compare)):
        (tmp_path / folder / inside).mkdir(parents=True)
        (tmp_path / folder / "experiment.toml").write_text(TOY.to_toml())
        with pytest.raises(RunError, match=r"Go on with it: fedloom (compare|run) --resume"):
            resume(TOY, tmp_path / folder, resume=True)


def test_a_refused_resume_leaves_the_settings_as_they_were(toy: None, tmp_path: Path) -> None:
    """They may be of an older version, which could not read them in today's words."""
    commands.run(TOY, tmp_path)
    (tmp_path / "inputs.json").write_text('{"data_sha256": "0", "base_sha256": "0", "prompt_sha256": "0"}')
    before = (tmp_path / "experiment.toml").read_bytes() + b"# as it was\n"
    (tmp_path / "experiment.toml").write_bytes(before)
    with pytest.raises(RunError, match="not what this run began with"):
        commands.run(TOY.with_(evaluation={"every": 2}), tmp_path, resume=True)
    assert (tmp_path / "experiment.toml").read_bytes() == before
