"""The tree of settings: what it refuses, and that it survives being written."""

from __future__ import annotations

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.names import ALGORITHMS
from fedloom.errors import ConfigError
from fedloom.experiment.settings import Experiment
from fedloom.experiment.toml import load, parse


def read(*overrides: str, text: str = "") -> Experiment:
    return parse(text, "mine.toml", overrides)


def refusal(*overrides: str, text: str = "") -> str:
    with pytest.raises(ConfigError) as refused:
        read(*overrides, text=text)
    return str(refused.value)


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("roundz=3", "roundz: there is no such key; did you mean 'rounds'?"),
        ("local.learning_rat=1", "local.learning_rat: there is no such key; did you mean 'learning_rate'?"),
        ("adapter.ranks=4", "adapter.ranks: there is no such key; did you mean 'rank'?"),
        ("dato.clients=3", "dato: there is no such key; did you mean 'data'?"),
        ("model.zzzzzz=1", "model.zzzzzz: there is no such key."),
        ("local.rounds=3", "local.rounds is not a setting; put rounds at the top of the file"),
        ("algorithm.name=fedavgg", "got 'fedavgg'; did you mean 'fedavg'?"),
        ("data.partition.kind=dirichelet", "got 'dirichelet'; did you mean 'dirichlet'?"),
        ("data.source=dolli", "data.source"),
        ("rounds=many", "rounds: Input should be a valid integer"),
        ("rounds=0", "rounds"),
        ("rounds=-1", "got -1"),
        ("rounds=100000", "rounds: Input should be less than or equal to 99999"),
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
        ("machine.workers=0", "machine.workers: Input should be 'auto' or greater than 0, got 0"),
        ("machine.workers=two", "machine.workers: Input should be 'auto' or a valid integer"),
        ("machine.workers=true", "machine.workers is neither true nor false. Expected a value like 1."),
        ("rounds=true", "rounds is neither true nor false"),
        ("local=5", "local: Input should be a dictionary"),
        ("compare.methods.base=fedavg", "compare.methods.base: this is the name of a row"),
        ("machine.kernels=slow", "machine.kernels"),
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


# --- algorithms ------------------------------------------------------------------------------------------


def test_only_some_algorithms_share_a_model() -> None:
    alone = {name for name in ALGORITHMS if not read(f"algorithm={name}").algorithm.shared}
    assert alone == {"local_only", "self_augmented"}


def test_further_methods_are_algorithms_with_options() -> None:
    experiment = read('compare.methods={"FewFedPIT 0.3" = {name = "fewfedpit", private_share = 0.3}}')
    assert experiment.compare.methods["FewFedPIT 0.3"] == FewFedPIT(private_share=0.3)


@pytest.mark.parametrize("label", ["base", "Federated", "local", "", "a:b", "../up", "x" * 33])
def test_a_method_cannot_have_a_name_that_is_taken_or_no_folder(label: str) -> None:
    assert "compare.methods" in refusal(text=f"[compare.methods]\n{tomli_w.dumps({label: 'fedavg'})}")


def test_a_method_that_does_not_exist_is_named() -> None:
    assert "got 'fedavgg'; did you mean 'fedavg'?" in refusal("compare.methods.FedIT=fedavgg")


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
            "cohort.kind=uniform",
            "data.partition.kind=dirichlet",
            "algorithm.name=local_only",
            "algorithm.server_optimizer.lr=0.25",
            "evaluation.examples=5",
            "compare.local_clients=2",
            'prompt.system=Say "hi"\\n',
            "name=ä b",
            "synthesis.temperature=0.5",
            "synthesis.filters.shortest=2",
            "synthesis=held_back",
            "compare.methods.FedIT=fedavg",
            'compare.methods={"FewFedPIT 0.3" = {name = "fewfedpit", private_share = 0.3}}',
            "data.canaries.copies=[1, 4]",
            "data.clusters.count=9",
            "data.pool=16",
            "leakage.every=2",
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
    if "synthesis=held_back" in changes:
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
    base = read("cohort.kind=uniform", "cohort.count=3", "local.schedule=cosine", "rounds=7")
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
    [("judge.tabel=wins", "table"), ("data.clusters.cuont=3", "count"), ("machine.vllm.pyton=x", "python")],
)
def test_a_misspelt_key_of_a_section_that_may_be_left_out_is_named_too(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
        load("quickstart", [wrong])


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "machine.device=cpu",
        "machine.kernels=reference",
        "machine.tokens_per_pass=512",
        "machine.checkpointing=true",
        "machine.clients_per_batch=2",
        "machine.workers=2",
        "machine.threads=1",
        "machine.ray=auto",
        "evaluation.every=3",
        "leakage.every=2",
        "compare.seeds=2",
        "model.base=random:llama",
    ],
)
def test_a_setting_that_changes_no_result_changes_no_fingerprint(change: str) -> None:
    assert read(change).fingerprint() == read().fingerprint()


def test_what_writes_synthetic_examples_is_part_of_the_fingerprint_where_any_are_made() -> None:
    vllm = "machine.vllm.python=python"
    assert read(vllm).fingerprint() == read().fingerprint()
    assert read("algorithm=fedpit", vllm).fingerprint() != read("algorithm=fedpit").fingerprint()


@pytest.mark.parametrize("label", ["FedIT mean", "The best", "My personal"])
def test_a_method_cannot_be_called_like_a_row_of_clients(label: str) -> None:
    with pytest.raises(ConfigError, match='does not end in "mean", "best" or "personal"'):
        load("quickstart", [f'compare.methods={{"{label}" = "fedavg"}}'])
