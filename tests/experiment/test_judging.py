"""A comparison judged in pairs: the papers' tables from one command, and again by another judge without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.errors import ConfigError, RunError
from fedloom.experiment import commands, judging
from fedloom.experiment.datasets import load_data
from fedloom.experiment.questions import questions_of, stored_of
from fedloom.experiment.settings import Experiment
from fedloom.experiment.toml import load
from fedloom.report import judged as reading
from fedloom.report import page
from fedloom.steps import Fit
from fedloom.storage.files import read_judged

SETTINGS = [
    "rounds=1",
    "data.examples=64",
    "data.hold_out=1",
    "data.clients=2",
    "compare.seeds=2",
    "data.partition.per_client=4",
    'compare.local=[["brainstorming"], ["open_qa", "closed_qa"]]',
    'compare.methods={ "Again" = "fedavg" }',
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Experiment]:
    """Two seeds of two clients on the embedded model."""
    folder = tmp_path_factory.mktemp("judging") / "table"
    experiment = load("fedit-table", SETTINGS)

    commands.compare(experiment, folder)
    return folder, experiment


@pytest.fixture
def table(finished: tuple[Path, Experiment], tmp_path: Path) -> tuple[Path, Experiment]:
    """A copy of one's own."""
    shutil.copytree(finished[0], tmp_path / "table")
    return tmp_path / "table", finished[1]


def rows(found: dict[str, Any]) -> list[str]:
    return [r["row"] for r in found["rows"]]


def test_fedit_s_table_has_every_baseline_beside_the_federated_model(table: tuple[Path, Experiment]) -> None:
    folder, experiment = table
    found = judging.judge(folder, experiment)
    assert rows(found) == ["base", "Local-1", "Local-2", "Again", "centralised"]
    assert [r["task"] for r in found["rows"]] == [
        "none",
        "brainstorming",
        "open_qa, closed_qa",
        "everybody's",
        "everybody's",
    ]
    assert {(r["judged"], r["of"], r["opponent"]) for r in found["rows"]} == {
        (16, 16, "federated")
    }  # 8 questions, 2 seeds
    rule = {
        r["row"]: r["mean"]
        for r in json.loads((folder / "summary.json").read_text())["rows"]
        if r["metric"] == "rule"
    }
    for r in found["rows"]:  # the rule judges as the measure did, but that a cut answer may please it
        assert r["scores"][0] >= 8 * rule[r["row"]] - 1e-9
    again = found["rows"][3]
    assert again["scores"][0] == again["scores"][1]  # the same method ends in the same answers
    assert again["order_disagreement"] == 0.0


def test_another_judge_trains_nothing_and_asks_for_no_answer_again(
    table: tuple[Path, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experiment = table
    judging.judge(folder, experiment)
    asked: list[Any] = []
    loaded = judging.load_machine

    def watched(experiment: Experiment) -> Any:
        machine = loaded(experiment)
        answer = machine.engine.answer
        monkeypatch.setattr(
            machine.engine, "answer", lambda requests: asked.extend(requests.values()) or answer(requests)
        )
        return machine

    monkeypatch.setattr(judging, "load_machine", watched)
    found = judging.judge(folder, experiment.with_(judge={"by": "likelihood"}))
    assert found["judge"]["judge"] == "likelihood"
    assert [type(request).__name__ for request in asked if not isinstance(request, Fit)] == ["Score"] * len(
        asked
    )  # of references alone
    asked.clear()
    judging.judge(folder, experiment.with_(judge={"by": "likelihood"}))
    assert asked == []  # every verdict is kept
    assert [t["judge"]["judge"] for t in read_judged(folder)] == ["microworld rule", "likelihood"]


def test_fedpit_s_table_has_every_method_and_the_mean_client_against_every_opponent(
    table: tuple[Path, Experiment],
) -> None:
    folder, experiment = table
    found = judging.judge(
        folder, experiment.with_(judge={"table": "wins", "against": ["reference", "Again"]})
    )
    against = {o: [r["row"] for r in found["rows"] if r["opponent"] == o] for o in ("reference", "Again")}
    everybody = ["base", "local mean", "Local-1", "Local-2", "Again", "federated", "centralised"]
    assert against == {"reference": everybody, "Again": [row for row in everybody if row != "Again"]}
    by = {(r["row"], r["opponent"]): r for r in found["rows"]}
    local = by["local mean", "reference"]
    assert (local["of"], local["model"]) == (32, "personal")  # 8 questions, 2 seeds, 2 clients
    assert by["base", "reference"]["win"]["mean"] == 0.0  # nobody is righter than right
    assert by["federated", "Again"]["tie"]["mean"] == 1.0
    for r in found["rows"]:
        assert r["win"]["mean"] + r["tie"]["mean"] + r["lose"]["mean"] == pytest.approx(1.0)


def test_the_page_and_the_terminal_show_the_same_table(table: tuple[Path, Experiment]) -> None:
    folder, experiment = table
    found = judging.judge(folder, experiment)
    html = page.write(folder).read_text("utf-8")
    [shown] = reading.tables(found, "FedIT")
    assert 'id="judged"' in html
    for line in shown.body:
        assert line[2] in html
    assert "paper&#39;s own" in html or "paper's own" in html


def test_judging_trains_no_method_that_was_not_compared(table: tuple[Path, Experiment]) -> None:
    folder, experiment = table
    more = experiment.plain()["compare"] | {"methods": {"New": "flexlora"}}
    with pytest.raises(RunError, match=r"no finished training of New, and judging trains nothing"):
        judging.judge(folder, experiment.with_(compare=more))
    assert not list(folder.rglob("method-new"))


QUESTIONS = [
    {"instruction": f"Question {i}?", "category": "x", "gpt": f"G{i}", "claude": f"C{i}"} for i in range(6)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), "utf-8")
    return path


def settings(experiment: Experiment, file: Path, **judge: Any) -> Experiment:
    evaluation = {**experiment.plain()["evaluation"], "questions": str(file), "references": str(file)}
    return experiment.with_(evaluation=evaluation, judge=judge)


def test_questions_that_a_client_holds_are_not_asked(
    finished: tuple[Path, Experiment], tmp_path: Path
) -> None:
    dataset = load_data(finished[1])
    held = next(iter(dataset.clients.values()))[0]
    path = tmp_path / "q.jsonl"
    records = [
        {"instruction": held.instruction.upper(), "context": held.context},
        {"instruction": "Nobody's?"},
    ]
    path.write_text("".join(json.dumps(q) + "\n" for q in records), "utf-8")
    words = {"kind": "endpoint", "url": "http://localhost:1", "model": "m"}
    questions, left_out = questions_of(settings(finished[1], path, by=words), dataset)
    assert ([q.instruction for q in questions], left_out) == (["Nobody's?"], 1)


def test_stored_answers_are_opponents_by_the_names_of_their_columns(
    finished: tuple[Path, Experiment], file: Path
) -> None:
    asked = [Example(q["instruction"], "") for q in QUESTIONS]
    assert stored_of(settings(finished[1], file), asked) == {
        "gpt": [f"G{i}" for i in range(6)],
        "claude": [f"C{i}" for i in range(6)],
    }


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"by": "rule"}, "6 of 6 questions have no rule, so the rule cannot judge them"),
        ({"by": "likelihood"}, "the questions have none"),
        (
            {"by": {"kind": "local", "model": "embedded"}, "table": "wins", "against": ["gpt-9"]},
            "judge.against names 'gpt-9'. Expected some of gpt, claude, base, federated, centralised, Again.",
        ),
    ],
)
def test_what_could_not_be_judged_is_refused_before_anything_is_trained(
    finished: tuple[Path, Experiment], file: Path, tmp_path: Path, judge: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        commands.compare(settings(finished[1], file, **judge), tmp_path / "new")
    assert not list((tmp_path / "new").rglob("metrics.jsonl"))


def test_a_category_that_nobody_has_is_refused_before_anything_is_trained(
    finished: tuple[Path, Experiment], tmp_path: Path
) -> None:
    wrong = finished[1].with_(compare={"seeds": 1, "local": [["poetry"]]})
    with pytest.raises(
        ConfigError, match=r"names the category 'poetry', .* Expected some of brainstorming, classification"
    ):
        commands.compare(wrong, tmp_path / "new")
    assert not list((tmp_path / "new").rglob("metrics.jsonl"))


def test_an_endpoint_s_cost_is_told_and_nothing_is_sent_without_consent(
    table: tuple[Path, Experiment],
) -> None:
    folder, experiment = table
    told: list[str] = []
    words = {"kind": "endpoint", "url": "http://localhost:1", "model": "m", "price_in": 2.0, "price_out": 8.0}
    with pytest.raises(ConfigError, match="Nothing was sent"):
        judging.judge(folder, experiment.with_(judge={"by": words, "questions": 4}), say=told.append)
    [cost] = [line for line in told if "requests" in line]
    # Of 5 baselines 4 answer otherwise than the federated model somewhere; equal pairs share a verdict: 80 at most.
    assert int(cost.split()[0]) <= 80  # 4 questions x 2 orders x 2 seeds x 5 baselines


def test_the_owners_of_a_few_categories_hold_these_alone(finished: tuple[Path, Experiment]) -> None:
    folder, experiment = finished
    held = json.loads((folder / "seed-0" / "local-2" / "metrics.jsonl").read_text().splitlines()[-1])
    dataset = load_data(experiment)
    own = [
        e for examples in dataset.clients.values() for e in examples if e.category in ("open_qa", "closed_qa")
    ]
    assert held["clients"]["Local-2"]["weight"] == len(own)
