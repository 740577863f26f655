"""Every recipe that ships can be read, built and written again."""

from __future__ import annotations

import pytest

from fedloom.config import load, parse, recipes
from fedloom.data.microworld import corpus

NAMES = sorted(recipes())


def test_the_recipes_the_readme_names_are_there() -> None:
    assert {"quickstart", "fedit-dolly", "fedit-medquad"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_called_what_its_file_is(name: str) -> None:
    assert load(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    assert recipes()[name].startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_being_written(name: str) -> None:
    assert parse(load(name).to_toml(), name).fingerprint() == load(name).fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_its_parts(name: str) -> None:
    experiment = load(name)
    clients = [f"client-{i:03d}" for i in range(experiment.data.clients or 9)]
    cohort = experiment.cohort.build(clients=clients, seed=experiment.seed)(0)
    assert set(cohort) <= set(clients)
    assert experiment.algorithm.build() is not None


def test_fedit_on_dolly_has_the_papers_confirmed_numbers() -> None:
    experiment = load("fedit-dolly")
    assert (experiment.data.clients, experiment.rounds, experiment.adapter.rank) == (100, 20, 8)
    assert experiment.cohort.plain() == {"kind": "fixed", "count": 5}
    assert experiment.data.hold_out * 8 == 80


def test_the_quickstart_needs_no_file() -> None:
    data = load("quickstart").data
    assert (data.source, data.path) == ("microworld", None)
    parts = data.partition.build()(corpus(examples=data.examples or 640), data.clients, 0)
    assert len(parts) == data.clients
