"""Files, folders of runs and overrides: what is read, what is refused, and what older versions called otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.server_optimizers import SGD
from fedloom.errors import ConfigError
from fedloom.experiment.settings import Experiment
from fedloom.experiment.toml import RENAMED, load, load_run, parse, recorded
from fedloom.selection import Poisson, Uniform
from fedloom.synthesis.pool import HeldBack
from fedloom.synthesis.self_instruct import SelfInstruct, SelfInstructWording


def read(*overrides: str, text: str = "") -> Experiment:
    return parse(text, "mine.toml", overrides)


def refusal(*overrides: str, text: str = "") -> str:
    with pytest.raises(ConfigError) as refused:
        read(*overrides, text=text)
    return str(refused.value)


# --- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("rounds=3", lambda e: e.rounds == 3),
        ("local.learning_rate=1e-4", lambda e: e.local.learning_rate == 1e-4),
        ("local.learning_rate=1", lambda e: e.local.learning_rate == 1.0),
        ("data.path=a file with = in it.jsonl", lambda e: e.data.path == "a file with = in it.jsonl"),
        ("data.path=1.jsonl", lambda e: e.data.path == "1.jsonl"),
        ('data.path=["a.csv", "b.csv"]', lambda e: e.data.path == ["a.csv", "b.csv"]),
        ("adapter.targets=all-linear", lambda e: e.adapter.targets == "all-linear"),
        ('adapter.targets=["q_proj", "v_proj"]', lambda e: e.adapter.targets == ("q_proj", "v_proj")),
        ("adapter.rslora=true", lambda e: e.adapter.rslora is True),
        (
            'data.columns={instruction = "q", response = "a"}',
            lambda e: e.data.columns == {"instruction": "q", "response": "a"},
        ),
        ("data.columns.instruction=q", lambda e: e.data.columns == {"instruction": "q"}),
        ("prompt.system=", lambda e: e.prompt.system == ""),
        ("name=my run", lambda e: e.name == "my run"),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(override: str, value: Any) -> None:
    assert value(read(override))


def test_later_overrides_win() -> None:
    assert read("rounds=3", "rounds=4", text="rounds = 2").rounds == 4


@pytest.mark.parametrize("item", ["rounds", "=3", "", "..=3"])
def test_an_override_without_a_key_and_a_value_is_refused(item: str) -> None:
    assert "Expected an override like rounds=5" in refusal(item)


def test_a_value_has_no_keys_below_it() -> None:
    assert "rounds is a value, not a section" in refusal("rounds.each=3", text="rounds = 2")


# --- overrides of a choice -------------------------------------------------------------------------------


def test_another_choice_drops_the_options_of_the_old_one() -> None:
    text = 'cohort = { kind = "poisson", rate = 0.5 }'
    assert read("cohort.kind=uniform", text=text).cohort == Uniform(count=1)


def test_the_same_choice_keeps_its_options() -> None:
    text = 'cohort = { kind = "poisson", rate = 0.5 }'
    assert read("cohort.kind=poisson", text=text).cohort == Poisson(rate=0.5)


def test_an_alias_is_the_same_choice_and_keeps_its_options() -> None:
    made = read("algorithm.name=ppfedit", text='algorithm = { name = "fewfedpit", keep = 3 }')
    assert made.algorithm == FewFedPIT(keep=3)


def test_a_choice_given_as_a_word_can_still_get_options() -> None:
    assert read("cohort.count=2", text='cohort = "uniform"').cohort == Uniform(count=2)


def test_a_choice_within_a_choice_can_be_named_and_then_changed() -> None:
    made = read("synthesis.wording=self_instruct", "synthesis.wording.item_end=x").synthesis
    assert made == SelfInstruct(wording=SelfInstructWording(item_end="x"))


@pytest.mark.parametrize("label", ["FedIT", '"FedIT"'])
def test_an_option_of_a_further_method_can_be_changed(label: str) -> None:
    made = read(f"compare.methods.{label}.server_optimizer.lr=0.5", text='compare.methods.FedIT = "fedavg"')
    assert made.compare.methods == {"FedIT": FedAvg(server_optimizer=SGD(lr=0.5))}


def test_a_method_whose_label_has_a_dot_is_quoted() -> None:
    text = '[compare.methods]\n"FewFedPIT 0.3" = { name = "fewfedpit", private_share = 0.3 }'
    made = read('compare.methods."FewFedPIT 0.3".keep=8', text=text)
    assert made.algorithms[1] == FewFedPIT(private_share=0.3, keep=8)


# --- where it comes from ---------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("rounds = 3")
    assert load(tmp_path / "x.toml").rounds == 3


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text("rounds = 3")
    assert load(tmp_path).rounds == 3


def test_a_name_that_is_nowhere_lists_the_recipes_and_guesses() -> None:
    with pytest.raises(
        ConfigError, match=r"quickstart.* there is no 'quickstrat'; did you mean 'quickstart'\?"
    ):
        load("quickstrat")


def test_bytes_that_are_no_text_are_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x.toml:1 is not UTF-8"):
        load(tmp_path / "x.toml")


# --- older versions --------------------------------------------------------------------------------------

OLD = {
    "rounds": 3,
    "model": {"device": "cpu", "path": "reference", "tokens_per_pass": 512, "checkpointing": True},
    "transport": {"width": 3},
    "audit": {"examples": 7, "every": 2},
    "cohort": {"kind": "fixed", "count": 2},
    "synthesis": {"kind": "spare", "candidates": 4},
}


def test_an_old_runs_folder_is_read_under_the_names_of_today(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(tomli_w.dumps(OLD))
    found = load(tmp_path)
    assert found.machine.device == "cpu"
    assert found.machine.kernels == "reference"
    assert found.machine.tokens_per_pass == 512
    assert found.machine.checkpointing
    assert found.machine.clients_per_batch == 3
    assert (found.audit.examples, found.leakage.every) == (7, 2)
    assert (found.cohort, found.synthesis) == (Uniform(count=2), HeldBack(candidates=4))


def test_an_old_name_given_as_a_word_is_read_in_a_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text('cohort = "fixed"')
    assert load(tmp_path).cohort == Uniform()


def test_a_run_may_be_called_like_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "experiment.toml").write_text("rounds = 123")
    monkeypatch.chdir(tmp_path)
    assert load_run(Path("quickstart")).rounds == 123
    assert load("quickstart").rounds != 123


def test_the_settings_in_an_old_runs_summary_are_those_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(tomli_w.dumps(OLD))
    assert recorded(OLD, "summary.json").plain() == load(tmp_path).plain()


def test_a_file_with_an_old_key_is_told_the_new_one() -> None:
    assert refusal(text="model.path = 'fast'") == (
        "mine.toml: model.path is now machine.kernels. Expected the new name."
    )


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_override_with_an_old_name_is_told_the_new_one(old: str, new: str) -> None:
    assert f"{old} is now {new}" in refusal(old if "=" in old else f"{old}=1")


def test_an_old_name_is_told_where_the_choice_is_given_as_a_word() -> None:
    assert "cohort.kind=fixed is now cohort.kind=uniform" in refusal(text='cohort = "fixed"')


def test_an_old_runs_folder_gives_no_leave_to_use_old_names(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(tomli_w.dumps(OLD))
    with pytest.raises(ConfigError, match=r"model\.path is now machine\.kernels"):
        load(tmp_path, ["model.path=fast"])
