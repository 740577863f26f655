"""fedloom judge, from its options to its table, on a run whose model is three lines long."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fedloom.experiment.judging  # noqa: F401  before a test replaces what it imports
from fedloom.cli import judge
from fedloom.data.example import Example
from fedloom.errors import ConfigError, RunError
from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import Machine
from fedloom.experiment.toml import load
from tests.evaluation.endpoint_server import SECRET, serve
from tests.fakes import FACTS, state

__all__ = ["serve"]  # a fixture
SETTINGS = ["data.examples=40", "data.clients=2", "data.hold_out=1", "data.private_facts=0"]


@dataclass
class Letters:
    format: str = "plain"
    system: str = ""
    max_length: int = 512
    stop: frozenset[int] = frozenset({0})

    def prompt_ids(self, example: Example, *, room: int = 0) -> list[int]:
        return [ord(c) for c in example.instruction]

    def reading_all(self) -> Letters:
        return self

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Parrot:
    """The tuned model gives the right answer, the base repeats the question."""

    right: Mapping[str, str]
    asked: list[Mapping[Hashable, Any]] = field(default_factory=list)
    workers: int = 1

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked.append(requests)
        return {row: [self._one(p, r.adapter) for p in r.prompts] for row, r in requests.items()}

    def _one(self, prompt: list[int], adapter: Any) -> list[int]:
        question = "".join(map(chr, prompt))
        return [ord(c) for c in (question if adapter is None else self.right[question])]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    experiment = load("quickstart", SETTINGS)
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "experiment.toml").write_text(experiment.to_toml(), "utf-8")
    test = load_data(experiment).test
    engine = Parrot({e.instruction: e.response for e in test})
    machine = Machine(engine, Letters(), None, None, FACTS)  # type: ignore[arg-type]
    monkeypatch.setattr("fedloom.experiment.judging.load_machine", lambda _: machine)
    monkeypatch.setattr("fedloom.experiment.judging.adapter_of", lambda *_: state(1.0))
    return folder


def judged(run: Path, *options: str) -> tuple[Any, dict[str, Any]]:
    app = typer.Typer()
    app.command()(judge.command)
    result = CliRunner().invoke(app, [str(run), *options], catch_exceptions=True)
    written = run / "judge.json"
    return result, json.loads(written.read_text("utf-8")) if written.exists() else {}


def test_by_default_the_rule_judges_the_run_against_its_base(run):
    result, written = judged(run)
    assert result.exit_code == 0, result.output
    assert "8 of 8 pairs judged" in result.output
    assert (written["win"]["count"], written["against"], written["judge"]) == (
        8,
        "base",
        {"judge": "microworld rule"},
    )


def test_the_held_out_responses_can_be_the_opponent(run):
    _, written = judged(run, "--against", "reference")
    assert written["tie"]["count"] == 8


def test_stored_answers_can_be_the_opponent(run, tmp_path):
    test = load_data(load(run)).test
    rows = [{"instruction": e.instruction, "context": e.context, "said": "No idea."} for e in test]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    _, written = judged(run, "--against", str(tmp_path / "other.jsonl"), "--field", "said")
    assert written["win"]["count"] == 8


def test_fewer_questions_can_be_asked_for(run):
    _, written = judged(run, "--questions", "3")
    assert written["questions"] == 3


def endpoint(server: Any, *options: str) -> list[str]:
    return [
        "--judge",
        "endpoint",
        "--url",
        server.url,
        "--model",
        "m",
        "--rubric",
        "total",
        "--key-variable",
        "A_KEY",
        *options,
    ]


@pytest.fixture
def longer(serve):
    """A server that likes the longer of two answers."""

    def plan(n: int, prompt: str) -> str:
        first, second = (part.partition("\n[End of")[0] for part in prompt.split("[Answer of assistant ")[1:])
        return "8 2" if len(first) > len(second) else "2 8" if len(first) < len(second) else "5 5"

    return serve(plan)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("A_KEY", SECRET)


@pytest.mark.parametrize("prices", [[], ["--price-in", "2", "--price-out", "8"], ["--price-in", "0"]])
def test_nothing_is_sent_before_somebody_agreed_to_pay(run, longer, prices):
    result, written = judged(run, *endpoint(longer, *prices))
    assert isinstance(result.exception, ConfigError)
    assert "Nothing was sent" in str(result.exception)
    assert (longer.prompts, written) == ([], {})


@pytest.mark.parametrize("agreed", [["--yes"], ["--price-in", "0", "--price-out", "0"]])
def test_an_endpoint_judges_after_agreement_or_for_free(run, longer, agreed):
    result, written = judged(run, *endpoint(longer, *agreed))
    assert result.exit_code == 0, result.output
    assert (written["judged"], len(longer.prompts)) == (8, 16)


def test_a_repeated_evaluation_costs_nothing_and_needs_no_consent(run, longer):
    _, first = judged(run, *endpoint(longer, "--yes"))
    result, again = judged(run, *endpoint(longer))
    assert "no request" in result.output
    assert (again, len(longer.prompts)) == (first, 16)


def test_the_cost_is_told_before(run, longer):
    result, _ = judged(run, *endpoint(longer, "--price-in", "2", "--price-out", "8"))
    assert "16 requests" in result.output
    assert "6,400 to receive" in result.output  # 16 x 400


def test_the_key_is_in_no_output_and_no_file(run, serve):
    server = serve(lambda n, prompt: SECRET)
    result, _ = judged(run, *endpoint(server, "--yes"))
    assert isinstance(result.exception, RunError)  # nothing could be judged
    assert "16 without scores: malformed reply" in result.output
    assert SECRET not in result.output + str(result.exception)
    assert not [f for f in run.rglob("*") if f.is_file() and SECRET in f.read_text("utf-8")]


def test_no_network_without_an_address(run):
    for options in (
        ["--judge", "endpoint", "--model", "m"],
        ["--judge", "rule", "--url", "http://localhost:1"],
    ):
        result, _ = judged(run, *options)
        assert "belong together" in str(result.exception)


def test_a_prompt_of_ones_own_is_used(run, longer, tmp_path):
    (tmp_path / "p.txt").write_text(
        "MINE {question} [Answer of assistant {first}\n[End of [Answer of assistant {second}\n[End of",
        "utf-8",
    )
    judged(run, *endpoint(longer, "--yes", "--prompt", str(tmp_path / "p.txt")))
    assert all(p.startswith("MINE ") for p in longer.prompts)
    assert len(longer.prompts) == 16


def test_python_gets_what_the_command_writes(run):
    import fedloom

    found = fedloom.judge(run, against=["reference"])
    assert json.loads(json.dumps(found)) == json.loads((run / "judge.json").read_text("utf-8"))
    assert found["tie"]["count"] == 8
