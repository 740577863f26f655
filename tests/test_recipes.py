"""Every recipe that ships can be read, built and written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.data.microworld import corpus
from fedloom.data.partition import Dirichlet
from fedloom.errors import DataError
from fedloom.experiment.datasets import load_data
from fedloom.experiment.toml import load, parse, recipes
from fedloom.selection import All, Selector, Uniform
from fedloom.synthesis.self_instruct import SelfInstruct
from tests.fakes import state

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
    assert set(experiment.cohort(clients, experiment.seed, 0)) <= set(clients)
    for algorithm in experiment.algorithms:
        assert algorithm.init(state(0.0)).round == 0


def test_fedit_on_dolly_has_the_papers_confirmed_numbers() -> None:
    experiment = load("fedit-dolly")
    assert (experiment.data.clients, experiment.rounds, experiment.adapter.rank) == (100, 20, 8)
    assert experiment.cohort == Uniform(count=5)
    assert experiment.data.hold_out * 8 == 80


def test_the_quickstart_needs_no_file() -> None:
    data = load("quickstart").data
    assert (data.source, data.path) == ("microworld", None)
    parts = data.partition(corpus(examples=data.examples or 640), data.clients, 0)
    assert len(parts) == data.clients


@pytest.mark.parametrize(
    ("name", "rounds", "clients", "per_cluster", "cohort"),
    [
        ("ppfedit-alpaca", 30, 50, 10, Uniform(count=2)),
        ("ppfedit-medinstruct", 10, 10, 5, All()),
    ],
)
def test_ppfedit_has_the_papers_confirmed_numbers(
    name: str, rounds: int, clients: int, per_cluster: int, cohort: Selector
) -> None:
    experiment = load(name)
    data, local, algorithm = experiment.data, experiment.local, experiment.algorithm
    assert (experiment.rounds, data.clients, experiment.cohort) == (rounds, clients, cohort)
    assert data.clusters is not None
    assert (data.clusters.count, data.pool) == (100, 100 * per_cluster)
    assert data.partition == Dirichlet(alpha=1.0)
    assert (experiment.adapter.rank, local.epochs, local.batch_size, local.schedule) == (16, 1, 8, "cosine")
    assert algorithm == FewFedPIT(private_share=0.5, keep=16)
    synthesis = experiment.synthesis
    assert isinstance(synthesis, SelfInstruct)
    assert (synthesis.shown, synthesis.trials, synthesis.temperature) == (8, 3, 0)


def test_few_shot_medquad_shares_160_questions_of_every_kind_among_ten(shared: Path) -> None:
    data = load_data(load("fedpit-medquad", [f"data.path={shared / 'data' / 'medquad.jsonl.xz'}"]))
    assert [len(own) for own in data.clients.values()] == [16] * 10
    assert len({e.category for own in data.clients.values() for e in own}) == 16
    assert data.table.distance > 0.2  # from everybody's mix: 0 would be IID


@pytest.mark.parametrize("name", ["ppfedit-alpaca", "ppfedit-medinstruct", "fedpit-alpacare"])
def test_clusters_become_the_labels_that_a_recipe_splits_along(name: str, tmp_path: Path) -> None:
    subjects = ("heart", "tree", "engine")
    rows = [{"instruction": f"{s} {s} number {n}", "output": f"the {s}"} for s in subjects for n in range(10)]
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(rows))
    small = ["data.clusters.count=3", "data.hold_out=2", "data.pool=12", "data.clients=4"]
    data = load_data(load(name, [f"data.path={file}", *small]))
    assert dict(data.table.totals) == {"cluster-000": 4, "cluster-001": 4, "cluster-002": 4}
    assert len(data.test) == 6


def test_fedpit_on_alpacare_shares_as_many_tasks_as_there_are_seeds_among_three() -> None:
    data = load("fedpit-alpacare").data
    assert (data.clients, data.pool) == (3, 167)
    assert data.partition == Dirichlet(alpha=1.0)


@pytest.mark.parametrize("name", ["fedpit-alpacare", "ppfedit-medinstruct"])
def test_the_seeds_of_alpacare_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    seed = {"topic": "Neurology", "instruction": "Explain it.", "input": "<noinput>", "difficulty": "1"}
    file = tmp_path / "med_seed.json"
    file.write_text(json.dumps([seed] * 167))
    with pytest.raises(DataError, match="None of the 167 records has a response"):
        load_data(load(name, [f"data.path={file}"]))
