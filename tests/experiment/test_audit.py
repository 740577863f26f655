"""An audit of a whole run: every position beside its controls, no text in the file, and a gate that can fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedloom.attacks.release import Limits, gate
from fedloom.data.example import Example
from fedloom.errors import ConfigError, RunError
from fedloom.experiment.audit import audit, replay
from fedloom.experiment.commands import run
from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import load_machine
from fedloom.experiment.positions import code, in_the_mix_of, of_synthesis
from fedloom.experiment.simulation import federated
from fedloom.experiment.toml import load
from fedloom.storage import checkpoint
from tests.cli.test_cli import refused, type_in
from tests.fakes import dataset, say

TINY = [
    "model.base=random:llama",
    "rounds=2",
    "adapter.rank=1",
    "data.examples=64",
    "data.clients=3",
    "data.hold_out=2",
    "data.private_facts=0",
    "data.partition={kind='by_size', sizes=[3, 1, 2]}",
    "local.learning_rate=1e-2",
    "examples_per_round=8",
    "evaluation.answers=0",
    "evaluation.max_new_tokens=4",
    "audit.references=64",
    "audit.examples=8",
    "cohort.kind=all",
]
CANARIES = "data.canaries={copies=[1, 2]}"


def trained(folder: Path, *settings: str) -> Path:
    run(load("quickstart", [*TINY, *settings]), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("audit") / "run", CANARIES)


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    return audit(finished, samples=4, full=True)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what is measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack", ["extraction", "discoverable", "greedy", "ranking", "membership", "exposure"]
)
def test_every_attack_of_the_public_is_mounted_on_the_base_too(found: dict[str, Any], attack: str) -> None:
    assert {"base", "released"} <= found["positions"]["public"][attack].keys()


def test_what_is_returned_is_what_the_file_holds(found: dict[str, Any], finished: Path) -> None:
    assert json.loads((finished / "audit.json").read_text()) == json.loads(json.dumps(found))


def test_no_training_text_is_in_the_file(found: dict[str, Any], finished: Path) -> None:
    text, data = (finished / "audit.json").read_text(), load_data(load(finished))
    examples = [*(e for own in data.clients.values() for e in own), *data.test]
    assert not [e.id for e in examples if e.instruction in text or e.response in text]
    assert not [e.id for e in examples if e.private and code(e) in text]


def test_exposure_is_told_by_number_of_copies(found: dict[str, Any]) -> None:
    exposure = found["positions"]["public"]["exposure"]
    assert [(g["copies"], g["canaries"]) for g in exposure["by_copies"]] == [(1, 3), (2, 3)]  # 3 clients
    mean = sum(g["mean"] for g in exposure["by_copies"]) / 2
    assert exposure["released"]["calibrated"]["planted"]["mean"] == pytest.approx(mean)


def test_attackers_are_after_the_secrets_of_others(found: dict[str, Any]) -> None:
    extracted = found["positions"]["client"]["cross_client"]
    assert extracted["base"].keys() == extracted["released"].keys()
    assert [got["coverage"]["of"] for got in extracted["released"].values()] == [
        4,
        4,
    ]  # 2 clients with 2 secrets each
    assert [got["decoys"]["of"] for got in extracted["released"].values()] == [6, 6]


def test_the_server_looks_at_the_client_with_the_fewest_examples(
    found: dict[str, Any], finished: Path
) -> None:
    sizes = {c: len(own) for c, own in load_data(load(finished)).clients.items()}
    server = found["positions"]["server"]
    assert server["examples"] == sizes[server["client"]] == min(sizes.values()) < max(sizes.values())
    assert server["round"] == 2
    assert {"inversion", "membership"} <= server.keys() & server["aggregated"].keys()


def test_tokens_are_counted_beside_those_that_only_held_out_examples_have(
    found: dict[str, Any], finished: Path
) -> None:
    experiment, read = load(finished), found["positions"]["server"]["inversion"]
    data, template = load_data(experiment), load_machine(experiment).template
    known = {*template.prompt_ids(""), template.end}
    own, other = (
        {i for e in examples for i in template.encode(e).ids} - known
        for examples in (data.clients[found["positions"]["server"]["client"]], data.test)
    )
    assert (read["tokens"], read["held_out"]["of"]) == (len(own), len(other - own))


def test_an_update_is_tried_on_held_out_examples_in_the_clients_own_mix() -> None:
    data = dataset({"a": (1.0,)}, test=[1.0, 2.0, 3.0, 4.0, 6.0, 7.0])  # four are "low", two "high"
    own = [say(0.5, "low"), *(say(x, "high") for x in (8.0, 9.0, 9.5, 9.75))]
    assert [e.category for e in in_the_mix_of(own, data)] == [
        "low",
        "high",
        "high",
    ]  # min(4/1, 2/4) = 1/2 of each, at least one


def test_the_replayed_round_ends_in_the_released_adapter(finished: Path) -> None:
    experiment = load(finished)
    simulated = federated(experiment, load_data(experiment), load_machine(experiment), finished)
    before = checkpoint.newest(finished / "state", fingerprint=experiment.fingerprint(), before=2).checkpoint
    assert before is not None
    assert before.state.round == 1
    views = replay(simulated, before)
    after = simulated.training.algorithm.server(before.state, [view.update for view in views.values()])
    assert after.adapter.sha256() == json.loads((finished / "summary.json").read_text())["adapter_sha256"]


def test_the_bound_on_epsilon_is_called_approximate(found: dict[str, Any]) -> None:
    assert found["one_run"]["canaries"] == 12  # 6 planted, 6 twins
    assert found["one_run"]["guesses"] == 3  # a quarter
    assert "coin" in found["one_run"]["approximate"]


def test_a_private_example_that_comes_back_as_synthetic_is_a_near_copy() -> None:
    data = dataset({"a": (1.0, 2.0), "b": (3.0,)})
    made = {"examples": [asdict(say(1.0)), asdict(Example("Of what colour is snow?", "White, mostly."))]}
    [(client, seen)] = of_synthesis(data, {"a": {"synthetic": made}, "b": {}}, seed=0)["clients"].items()
    assert (client, seen["examples"], seen["private"]) == ("a", 2, 2)
    assert (seen["max"], seen["near"]["hits"]) == (1.0, 1)


def test_a_secret_in_a_synthetic_example_is_counted() -> None:
    secret = Example("What is the code?", "It is 4 7 1 1.", private=True)
    data = dataset({"a": (1.0,)})
    data.clients["a"].append(secret)  # type: ignore[attr-defined]
    made = {"examples": [asdict(Example("Which code?", "Try 4 7 1 1 first."))]}
    assert of_synthesis(data, {"a": {"synthetic": made}}, seed=0)["clients"]["a"]["secrets"]["value"] == 1.0


@pytest.mark.parametrize(
    ("response", "secret"),
    [
        ("The access code of Ann is 1 2 3 4.", "1 2 3 4"),
        ("Room 12, code 0471", "0471"),
        ("7 of them left.", ""),
    ],
)
def test_a_secret_is_the_digits_that_a_response_ends_with(response: str, secret: str) -> None:
    assert code(Example("", response)) == secret


# --- runs that lack something -----------------------------------------------------------------------------


def test_without_canaries_the_rest_is_measured(tmp_path: Path) -> None:
    found = audit(trained(tmp_path / "run"), samples=2)
    public = found["positions"]["public"]
    assert "data.canaries" in public["exposure"]["reason"]
    assert public["membership"]["released"]["reference"]["auc"] >= 0
    told = gate(found, Limits(exposure=3.0))
    assert (told["gate"][0]["value"], told["passed"]) == (None, False)


def test_a_limit_on_canaries_that_were_not_planted_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "experiment.toml").write_text(load("quickstart", TINY).to_toml())
    (tmp_path / "adapter").mkdir()  # its training has ended
    begun: list[str] = []
    with pytest.raises(ConfigError, match=r"--max-exposure needs planted canaries.*data\.canaries"):
        audit(tmp_path, limits=Limits(exposure=3.0), say=begun.append)
    assert begun == []


def test_a_comparison_is_audited_by_its_first_seeds_federation(copied: Path, found: dict[str, Any]) -> None:
    home = copied / "seed-0" / "federated"
    home.mkdir(parents=True)
    (copied / "state").rename(home / "state")
    (copied / "inputs.json").rename(home / "inputs.json")
    again = audit(copied, samples=4, full=True)
    assert again["positions"]["server"] == found["positions"]["server"]


def test_with_one_committed_round_left_the_server_says_why_not(copied: Path) -> None:
    (copied / "state" / "round-00001.json").unlink()
    found = audit(copied, samples=2, limits=Limits(recall=0.5))
    assert "two committed rounds" in found["positions"]["server"]["reason"]
    assert found["gate"] == [
        {
            "measure": "recall",
            "limit": 0.5,
            "value": None,
            "passed": False,
            "reason": found["positions"]["server"]["reason"],
        }
    ]


def test_other_data_than_the_runs_are_refused(copied: Path) -> None:
    inputs = json.loads((copied / "inputs.json").read_text())
    (copied / "inputs.json").write_text(json.dumps({**inputs, "data_sha256": "0" * 64}))
    with pytest.raises(RunError, match="data are not what this run was trained with"):
        audit(copied)


def test_what_was_trained_on_cannot_be_changed(finished: Path) -> None:
    with pytest.raises(ConfigError, match="cannot change 'data'"):
        audit(finished, ["data.clients=4"])


def test_how_is_measured_can_be_changed(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    assert audit(folder, ["audit.references=16"], samples=2)["targets"]["references"] == 16


def test_a_run_that_shares_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(load("quickstart", ["algorithm=local_only"]).to_toml())
    (tmp_path / "adapter").mkdir()  # its training has ended
    with pytest.raises(RunError, match="shares no model"):
        audit(tmp_path)


# --- the gate ---------------------------------------------------------------------------------------------


def test_without_limits_nothing_is_passed_or_failed(found: dict[str, Any]) -> None:
    assert gate(found, Limits()) == {"gate": [], "passed": None}


def test_one_failed_limit_fails_the_gate(found: dict[str, Any]) -> None:
    told = gate(found, Limits(extraction=0.999, auc=0.5, on="estimate"))
    assert [(line["measure"], line["passed"]) for line in told["gate"]] == [
        ("auc", False),
        ("extraction", True),
    ]
    assert told["passed"] is False


@pytest.mark.parametrize(
    "limits", [Limits(exposure=6.0), Limits(auc=1.0), Limits(recall=1.0), Limits(auc=float("nan"))]
)
def test_a_limit_that_nothing_can_exceed_is_refused(finished: Path, limits: Limits) -> None:
    with pytest.raises(ConfigError, match="and below"):
        audit(finished, limits=limits)  # log2(64) = 6 bits


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_exits_with_1_and_says_what_failed(finished: Path) -> None:
    done = type_in("audit", finished, "--samples", "2", "--max-auc", "0.5", "--max-extraction", "0.999")
    assert done.code == 1
    assert done.err.count("fedloom: ") == 1
    assert (
        "AUC of the best membership attack, beyond what the base tells apart, at most 0.5: found" in done.err
    )
    assert "at most 0.999: found" in done.out


def test_the_command_prints_its_table_and_where_the_file_lies(finished: Path) -> None:
    done = type_in("audit", finished, "--samples", "2", "--max-extraction", "0.999")
    assert done.code == 0
    measures = ("Extraction", "Ends of", "Unprompted", "Membership", "planted", "Secrets of", "upload", "ε")
    assert [word for word in measures if word not in done.out] == []
    assert str(finished / "audit.json") in done.out
    assert "no proof of privacy" in done.out


def test_a_run_that_is_nowhere_is_a_mistake_and_no_failed_gate(tmp_path: Path) -> None:
    assert "nowhere" in refused("audit", tmp_path / "nowhere", "--max-auc", "0.6")
