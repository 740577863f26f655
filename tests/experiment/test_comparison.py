"""Base, local-only, federated and centralised tuning from one command, resumable seed by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.experiment import commands, comparison, simulation
from fedloom.experiment import summary as summaries
from fedloom.experiment.build import pooled_client
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine
from fedloom.report import card, page
from fedloom.rows import is_single
from tests.fakes import FOUR, ToyEngine, ToyMachine, dataset, experiment, machine, value

TOY = experiment(adapter={"rank": 1}, compare={"seeds": 2}, cohort={"kind": "uniform", "count": 2}, rounds=4)
DATA = dataset(FOUR)


@dataclass
class Toy:
    listener: Listener | None = None  # of every training, in place of the comparison's own


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Comparisons on the toy engine."""
    toy, told = Toy(), comparison.Watch.training
    monkeypatch.setattr(comparison.Watch, "training", lambda self, row: toy.listener or told(self, row))
    monkeypatch.setattr(comparison, "POLL", 0.01)
    monkeypatch.setattr(commands, "load_data", lambda *_, **__: dataset(FOUR))
    monkeypatch.setattr(commands, "load_workers", lambda *_, **__: machine(ToyEngine(workers=2)))
    monkeypatch.setattr(page, "write", lambda folder: None)
    monkeypatch.setattr(card, "model_card", lambda summary: "a card")
    monkeypatch.setattr(summaries, "environment", dict)
    return toy


class Stop(BaseException):
    pass


class StopsAfter(Listener):
    def __init__(self, count: int):
        self._left = count

    def committed(self, record: Mapping[str, Any]) -> None:
        self._left -= 1
        if not self._left:
            raise Stop


def untimed(summary: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(summary))
    for line in plain["rounds"]:
        del line["seconds"]
    for when in ("started", "finished"):
        del plain["provenance"][when]
    return plain  # type: ignore[no-any-return]


def values(summary: Mapping[str, Any], row: str) -> list[float]:
    [found] = [r["values"] for r in summary["rows"] if r["row"] == row]
    return list(found)


def test_all_rows_are_there_for_every_seed(toy: Toy, tmp_path: Path) -> None:
    summary = commands.compare(TOY, tmp_path)
    names = dict.fromkeys(r["row"] for r in summary["rows"])
    assert list(names) == [
        "base",
        "local mean",
        "local best",
        "federated",
        "centralised",
        *(f"local:{c}" for c in "abcd"),
    ]
    assert all(r["seeds"] == [0, 1] for r in summary["rows"])


METHODS = {"compare": {"seeds": 2, "methods": {"Mine": "fedavg", "Alone again": "local_only"}}}


def test_further_methods_are_rows_between_local_and_federated(toy: Toy, tmp_path: Path) -> None:
    summary = commands.compare(TOY.with_(**METHODS), tmp_path)
    named = [n for n in dict.fromkeys(r["row"] for r in summary["rows"]) if not is_single(n)]
    assert named == [
        "base",
        "local mean",
        "local best",
        "Mine",
        "Alone again mean",
        "Alone again best",
        "federated",
        "centralised",
    ]
    models = {r["row"]: r["model"] for r in summary["rows"]}
    assert (models["Mine"], models["Alone again mean"], models["Alone again:a"]) == (
        "global",
        "personal",
        "personal",
    )


def test_the_same_algorithm_under_another_name_ends_the_same(toy: Toy, tmp_path: Path) -> None:
    summary = commands.compare(TOY.with_(**METHODS), tmp_path)
    assert values(summary, "Mine") == values(summary, "federated")
    assert values(summary, "Alone again mean") == values(summary, "local mean")
    assert (tmp_path / "seed-0" / "method-alone-again" / "metrics.jsonl").exists()


def test_progress_counts_the_rounds_of_further_methods(toy: Toy, tmp_path: Path) -> None:
    seen: list[comparison.Progress] = []
    commands.compare(TOY.with_(**METHODS), tmp_path, on_progress=seen.append)
    assert seen[-1].rounds == seen[-1].total == 2 * 5 * 4


def test_an_algorithm_without_a_shared_model_is_no_experiment_to_compare(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains no shared model"):
        commands.compare(TOY.with_(algorithm="local_only"), tmp_path)


def test_local_rows_sum_up_the_single_clients(toy: Toy, tmp_path: Path) -> None:
    summary = commands.compare(TOY, tmp_path)
    single = [values(summary, f"local:{c}") for c in "abcd"]
    assert values(summary, "local best") == [min(v) for v in zip(*single, strict=True)]
    assert values(summary, "local mean") == pytest.approx([sum(v) / 4 for v in zip(*single, strict=True)])


@pytest.mark.parametrize("count", [1, 4, 5, 7, 9, 12, 17])
def test_a_comparison_stopped_in_the_middle_ends_in_the_same_summary(
    toy: Toy, tmp_path: Path, count: int
) -> None:
    expected = untimed(commands.compare(TOY, tmp_path / "whole"))
    toy.listener = StopsAfter(count)
    with pytest.raises(Stop):
        commands.compare(TOY, tmp_path / "parts")
    toy.listener = None
    assert untimed(commands.compare(TOY, tmp_path / "parts", resume=True)) == expected


def test_a_finished_seed_is_not_computed_again(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.compare(TOY, tmp_path)
    (tmp_path / "summary.json").unlink()
    monkeypatch.setattr(commands, "load_workers", None)  # nobody may ask for them
    assert commands.compare(TOY, tmp_path, resume=True)["kind"] == "compare"


def test_progress_counts_every_round_of_every_row(toy: Toy, tmp_path: Path) -> None:
    seen: list[comparison.Progress] = []
    commands.compare(TOY, tmp_path, on_progress=seen.append)
    assert (seen[0].rounds, seen[0].total) == (0, 2 * 3 * 4)
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)
    assert seen[-1].finished == 2
    assert seen[-1].rounds == seen[-1].total


def test_the_first_seed_s_summary_is_told_while_others_go_on(toy: Toy, tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []

    def on_first(summary: Mapping[str, Any]) -> None:
        told.append(summary)
        assert not (tmp_path / "summary.json").exists()

    whole = commands.compare(TOY.with_(compare={"seeds": 9}), tmp_path, on_first=on_first)
    [first] = told
    assert {tuple(r["seeds"]) for r in first["rows"]} == {(0,)}
    for row in ("base", "local mean", "local best", "federated", "centralised"):
        assert values(first, row) == values(whole, row)[:1]


def test_a_single_seed_is_not_told_twice(toy: Toy, tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    commands.compare(TOY.with_(compare={"seeds": 1}), tmp_path, on_first=told.append)
    assert told == []


def test_the_row_with_most_steps_in_sequence_is_served_first(tmp_path: Path) -> None:
    places: dict[str, int] = {}

    class Placed(ToyMachine):
        def ranked(self, place: int) -> Machine:
            places[row] = place
            return self

    steps = TOY.with_(local={"batch_size": 1})
    for row in ("local_only", "federated", "centralised"):
        getattr(simulation, row)(steps, DATA, Placed(**vars(machine())), tmp_path)
    assert places["centralised"] < places["federated"] == places["local_only"]


def trained(folder: Path, row: str) -> dict[str, Any]:
    training = getattr(simulation, row)(TOY, DATA, machine(), folder)
    training.finish(Listener())
    return {c: client.memory.get("seen/local", 0) for c, client in training.clients.items()}


def test_local_only_clients_train_in_every_round(tmp_path: Path) -> None:
    assert trained(tmp_path, "local_only") == {c: 4 * len(xs) for c, xs in FOUR.items()}


def test_centralised_tuning_sees_as_many_examples_as_the_cohort_on_average(tmp_path: Path) -> None:
    # 10 examples with 4 clients, 2 of them a round: 2.5 * 2 a round, over 4 rounds.
    assert trained(tmp_path, "centralised") == {"centralised": 20}


def test_with_the_budget_of_steps_centralised_tuning_sees_as_many_as_one_client(tmp_path: Path) -> None:
    steps = TOY.with_(compare={"budget": "steps"})
    training = simulation.centralised(steps, DATA, machine(), tmp_path)
    training.finish(Listener())
    assert training.clients["centralised"].memory["seen/local"] == 4 * 2  # 2.5 a round, rounded to even


def test_with_the_budget_of_steps_centralised_tuning_takes_as_many_steps_as_one_client() -> None:
    # 2.5 examples on average in batches of 4 over 3 epochs: 3 steps of each client, but 2 on 7.5 examples of the pool.
    steps = TOY.with_(compare={"budget": "steps"}, local={"epochs": 3, "batch_size": 4})
    [pooled] = pooled_client(steps, DATA, 2.0).values()
    assert steps.local.steps_of(len(pooled.examples), pooled.limit) == 3
    assert pooled.limit == 9


def test_centralised_tuning_holds_what_all_hold(tmp_path: Path) -> None:
    [client] = simulation.centralised(TOY, DATA, machine(), tmp_path).clients.values()
    assert sorted(value(e) for e in client.examples) == sorted(x for xs in FOUR.values() for x in xs)


def test_fewer_local_clients_are_drawn_by_the_seed(tmp_path: Path) -> None:
    few = TOY.with_(compare={"local_clients": 2})
    drawn = sorted(simulation.local_only(few, DATA, machine(), tmp_path).clients)
    assert len(drawn) == 2
    assert drawn == sorted(simulation.local_only(few, DATA, machine(), tmp_path).clients)
    others = {
        tuple(sorted(simulation.local_only(few.with_(seed=s), DATA, machine(), tmp_path).clients))
        for s in range(9)
    }
    assert len(others) > 1


def test_rows_of_one_folder_cannot_be_mixed_up(tmp_path: Path) -> None:
    prints = {
        getattr(simulation, row)(TOY, DATA, machine(), tmp_path).training.fingerprint
        for row in ("local_only", "federated", "centralised")
    }
    assert len(prints) == 3
