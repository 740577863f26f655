"""One experiment, one file: what is read, what is refused, and that it survives being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.server_optimizers import SGD
from fedloom.data.partition import Dirichlet
from fedloom.errors import ConfigError
from fedloom.experiment.settings import ALGORITHMS, Experiment, load, parse
from fedloom.selection import All, Fixed


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


@pytest.mark.parametrize("item", ["rounds", "=3", ""])
def test_an_override_without_a_key_and_a_value_is_refused(item: str) -> None:
    assert "Expected an override like rounds=5" in refusal(item)


def test_a_value_has_no_keys_below_it() -> None:
    assert "rounds is a value, not a section" in refusal("rounds.each=3", text="rounds = 2")


# --- choices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", 'cohort = "all"', 'cohort = { kind = "all" }', '[cohort]\nkind = "all"']
)
def test_a_choice_may_be_left_out_named_or_spelt_out(text: str) -> None:
    assert isinstance(read(text=text).cohort.build(clients=["a"], seed=0), All)


def test_a_choice_builds_its_class_with_its_options() -> None:
    cohort = read("cohort.kind=fixed", "cohort.count=2").cohort.build(clients=["a", "b", "c"], seed=7)
    assert cohort == Fixed(["a", "b", "c"], seed=7, count=2)


def test_options_may_come_before_the_choice_is_named_in_the_file() -> None:
    made = read(text='[data.partition]\nalpha = 0.3\nkind = "dirichlet"').data.partition.build()
    assert isinstance(made, Dirichlet)
    assert made.alpha == 0.3


def test_another_choice_drops_the_options_of_the_old_one() -> None:
    text = 'cohort = { kind = "poisson", rate = 0.5 }'
    assert read("cohort.kind=fixed", text=text).cohort.options == {"count": 1}
    assert read("cohort.kind=poisson", text=text).cohort.options == {"rate": 0.5}


def test_a_choice_given_as_a_word_can_still_get_options() -> None:
    assert read("cohort.count=2", text='cohort = "fixed"').cohort.options == {"count": 2}
    assert isinstance(
        read("algorithm.name=local_only", text='algorithm = "fedavg"').algorithm.build(), LocalOnly
    )


def test_a_choice_may_be_an_option_of_another() -> None:
    built = read("algorithm.server_optimizer.lr=0.5").algorithm.build()
    assert isinstance(built, FedAvg)
    assert built.server_optimizer == SGD(lr=0.5)


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("roundz=3", "roundz: there is no such key; did you mean 'rounds'?"),
        ("local.learning_rat=1", "local.learning_rat: there is no such key; did you mean 'learning_rate'?"),
        ("adapter.ranks=4", "adapter.ranks: there is no such key; did you mean 'rank'?"),
        ("dato.clients=3", "dato: there is no such key; did you mean 'data'?"),
        ("model.zzzzzz=1", "model.zzzzzz: there is no such key."),
        ("local.rounds=3", "local.rounds is not a setting; rounds belongs at the top of the file"),
        ("algorithm.name=fedavgg", "got 'fedavgg'; did you mean 'fedavg'?"),
        ("data.partition.kind=dirichelet", "got 'dirichelet'; did you mean 'dirichlet'?"),
        ("data.source=dolli", "data.source"),
        ("rounds=many", "rounds: Input should be a valid integer"),
        ("rounds=0", "rounds"),
        ("rounds=-1", "got -1"),
        ("local.learning_rate=fast", "local.learning_rate"),
        ("local.batch_size=0", "batch_size"),
        ("local.learning_rate=nan", "local.learning_rate"),
        ("local.clip=inf", "local.clip"),
        ("adapter.rank=0", "rank of at least 1"),
        ("adapter.dropout=1.0", "dropout in [0, 1)"),
        ("algorithm.server_optimizer.lr=0", "lr > 0"),
        ("data.hold_out=0", "data.hold_out"),
        ("evaluation.every=0", "evaluation.every"),
        ("cohort.clients=3", "clients: there is no such key"),
        ("seed=-1", "seed"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_key(override: str, said: str) -> None:
    message = refusal(override)
    assert said in message
    assert "mine.toml" in message
    assert "Traceback" not in message


def test_every_mistake_is_listed_at_once() -> None:
    message = refusal("roundz=3", "data.clientz=2", "local.epochs=x")
    assert all(word in message for word in ("roundz", "clientz", "local.epochs"))
    assert len(message.splitlines()) == 4


def test_toml_that_is_none_is_said_with_its_line() -> None:
    assert "mine.toml is not valid TOML" in refusal(text="rounds = \n")
    assert "line 1" in refusal(text="rounds = \n")


# --- algorithms with parts -------------------------------------------------------------------------------


def test_the_parts_of_an_algorithm_are_no_settings() -> None:
    assert "there is no such key" in refusal("algorithm.name=fewfedpit", "algorithm.synthesize=1")
    assert set(read("algorithm=fewfedpit").algorithm.options) == {
        "server_optimizer",
        "private_share",
        "keep",
        "rule",
        "drop_unhelpful",
        "every",
    }


def test_an_algorithm_checks_its_options_when_the_file_is_read() -> None:
    assert "private_share in [0, 1], got 2.0" in refusal(
        "algorithm.name=fewfedpit", "algorithm.private_share=2"
    )


def test_the_journal_version_has_its_name_too() -> None:
    assert read("algorithm=ppfedit").algorithm.make is read("algorithm=fewfedpit").algorithm.make


def test_only_some_algorithms_share_a_model() -> None:
    alone = {name for name in ALGORITHMS if not read(f"algorithm={name}").algorithm.shared}
    assert alone == {"local_only", "self_augmented"}


def test_options_two_levels_down_are_checked() -> None:
    assert "synthesis.filters.shorest: there is no such key" in refusal("synthesis.filters.shorest=3")
    assert "temperature" in refusal("synthesis.temperature=warm")
    assert (
        read("synthesis.wording=self_instruct").synthesis.options["wording"].build().item_end == "\n\nTask "
    )


def test_further_methods_are_algorithms_with_options() -> None:
    experiment = read('compare.methods={"FewFedPIT 0.3" = {name = "fewfedpit", private_share = 0.3}}')
    assert experiment.compare.methods["FewFedPIT 0.3"].options["private_share"] == 0.3


@pytest.mark.parametrize("label", ["base", "Federated", "local", "", "a:b", "../up", "x" * 33])
def test_a_method_cannot_have_a_name_that_is_taken_or_no_folder(label: str) -> None:
    assert "compare.methods" in refusal(text=f"[compare.methods]\n{tomli_w.dumps({label: 'fedavg'})}")


def test_a_method_that_does_not_exist_is_named() -> None:
    assert "got 'fedavgg'; did you mean 'fedavg'?" in refusal("compare.methods.FedIT=fedavgg")


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


# --- writing it ------------------------------------------------------------------------------------------


def test_every_default_is_written_out() -> None:
    written = read().to_toml()
    assert "learning_rate = 0.0003" in written
    assert parse(written, "x") == read()


overrides = st.lists(
    st.sampled_from(
        [
            "rounds=3",
            "seed=9",
            "local.clip=2.5",
            "local.optimizer=sgd",
            "local.schedule=cosine",
            "adapter.rslora=true",
            'adapter.targets=["q_proj", "o_proj"]',
            "data.path=some where.jsonl",
            'data.path=["a", "b"]',
            "data.examples=99",
            "data.columns.instruction=q",
            "cohort.kind=poisson",
            "cohort.kind=fixed",
            "data.partition.kind=dirichlet",
            "algorithm.name=local_only",
            "algorithm.server_optimizer.lr=0.25",
            "evaluation.examples=5",
            "compare.local_clients=2",
            'prompt.system=Say "hi"\\n',
            "name=ä b",
            "synthesis.temperature=0.5",
            "synthesis.filters.shortest=2",
            "synthesis=spare",
            "compare.methods.FedIT=fedavg",
            'compare.methods={"FewFedPIT 0.3" = {name = "fewfedpit", private_share = 0.3}}',
            "data.canaries.copies=[1, 4]",
            "data.clusters.count=9",
            "data.pool=16",
            "audit.every=2",
        ]
    ),
    max_size=6,
    unique=True,
)


@given(overrides)
@settings(max_examples=40, deadline=None)
def test_writing_and_reading_changes_no_fingerprint(changes: list[str]) -> None:
    if "algorithm.name=local_only" in changes:
        changes = [c for c in changes if not c.startswith("algorithm.server")]
    if "synthesis=spare" in changes:
        changes = [c for c in changes if not c.startswith("synthesis.")]
    experiment = read(*changes)
    again = parse(experiment.to_toml(), "again")
    assert again.fingerprint() == experiment.fingerprint()
    assert again.to_toml() == experiment.to_toml()
    assert tomli_w.dumps(again.plain()) == again.to_toml()


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "rounds=11",
        "local.epochs=2",
        "data.partition.kind=iid",
        "model.dtype=bfloat16",
        "prompt.max_length=64",
    ],
)
def test_another_setting_is_another_fingerprint(change: str) -> None:
    base = read("data.partition.kind=dirichlet")
    assert read("data.partition.kind=dirichlet", change).fingerprint() != base.fingerprint()


def test_with_changes_what_it_says_and_nothing_else() -> None:
    base = read("cohort.kind=fixed", "cohort.count=3", "local.schedule=cosine", "rounds=7")
    other = base.with_(seed=5)
    assert other.seed == 5
    assert other.local.rounds == 7  # the length of the cosine is the run's
    assert other.with_(seed=0).fingerprint() == base.fingerprint()
    assert base.with_(rounds=9).local.rounds == 9


def test_an_experiment_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        read().rounds = 3


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("judge.tabel=wins", "table"), ("data.clusters.cuont=3", "count"), ("model.vllm.pyton=x", "python")],
)
def test_a_misspelt_key_of_a_section_that_may_be_left_out_is_named_too(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
        load("quickstart", [wrong])
