"""Three numbers a model: high for what was learnt by heart, chance for what was not."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.measure import leaks, targets_of
from fedloom.experiment.toml import load
from fedloom.steps import Fit

SETTINGS = [
    "data.pool=8",
    "data.clients=2",
    "data.examples=80",
    "data.hold_out=1",
    "data.canaries={copies=[1, 2]}",
    "audit.references=64",
    "audit.examples=8",
    "local.epochs=25",
    "local.learning_rate=1e-2",
    "local.schedule=constant",
]


@pytest.fixture(scope="module")
def world() -> tuple[Any, Dataset, Machine]:
    experiment = load("fedpit-microworld", SETTINGS)
    return experiment, load_data(experiment), load_machine(experiment)


@pytest.fixture(scope="module")
def found(world: tuple[Any, Dataset, Machine]) -> dict[str, dict[str, float]]:
    experiment, data, machine = world
    start = machine.engine.initial_adapter(0)
    everything = [e for own in data.clients.values() for e in own]
    fitted = machine.engine.answer({0: Fit(start, everything, experiment.local.at(0), experiment.seed)})[0]
    return leaks(experiment, data, machine, {"fresh": start, "by heart": fitted.adapter})


def test_a_model_that_learnt_by_heart_leaks_in_every_measure(found: dict[str, dict[str, float]]) -> None:
    leaky = found["by heart"]
    assert leaky["exposure"] > 5.5  # of log2(64) = 6 bits
    assert leaky["auc"] > 0.9
    assert leaky["extraction"] > 0.95


def test_an_untrained_adapter_leaks_what_the_base_does(found: dict[str, dict[str, float]]) -> None:
    assert found["fresh"]["extraction"] == pytest.approx(found["base"]["extraction"])
    assert found["base"]["extraction"] < 0.4
    assert found["fresh"]["exposure"] < 1.5
    assert found["fresh"]["auc"] == pytest.approx(0.5, abs=0.2)


def test_targets_are_the_same_for_every_model_and_secrets_are_not_among_the_records(
    world: tuple[Any, Dataset, Machine],
) -> None:
    experiment, data, _ = world
    on = targets_of(experiment, data)
    assert on == targets_of(experiment, data)
    assert not any(e.private for e in [*on.members, *on.held_out])
    assert sorted(on.canaries.values()) == [1, 1, 2, 2]
    assert len(on.twins) == 4


def test_without_canaries_there_is_no_exposure(world: tuple[Any, Dataset, Machine]) -> None:
    experiment = load("fedpit-microworld", [*SETTINGS, "data.canaries={copies=[1]}"])
    plain = experiment.with_(data={k: v for k, v in experiment.plain()["data"].items() if k != "canaries"})
    found = leaks(plain, load_data(plain), world[2], {})
    assert set(found) == {"base"}
    assert set(found["base"]) == {"extraction", "auc"}
