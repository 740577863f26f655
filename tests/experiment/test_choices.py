"""A choice among classes: written as a table or a word, held as the instance itself."""

from __future__ import annotations

import pytest

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.server_optimizers import SGD
from fedloom.data.partition import Dirichlet
from fedloom.errors import ConfigError
from fedloom.experiment.choices import OneOf
from fedloom.experiment.settings import ALGORITHM, CODEC, COHORT, PARTITION, SYNTHESIS, Experiment
from fedloom.experiment.toml import parse
from fedloom.selection import All, Uniform
from fedloom.transport.codec import Int8


def read(*overrides: str, text: str = "") -> Experiment:
    return parse(text, "mine.toml", overrides)


def refusal(*overrides: str, text: str = "") -> str:
    with pytest.raises(ConfigError) as refused:
        read(*overrides, text=text)
    return str(refused.value)


@pytest.mark.parametrize(
    "text", ["", 'cohort = "all"', 'cohort = { kind = "all" }', '[cohort]\nkind = "all"']
)
def test_a_choice_may_be_left_out_named_or_spelt_out(text: str) -> None:
    assert read(text=text).cohort == All()


def test_a_choice_that_is_left_out_is_the_one_that_an_option_without_a_name_is_of() -> None:
    made = read()
    assert type(made.algorithm) is next(iter(ALGORITHM.table.values()))
    assert type(made.synthesis) is next(iter(SYNTHESIS.table.values()))
    assert type(made.cohort) is next(iter(COHORT.table.values()))
    assert type(made.data.partition) is next(iter(PARTITION.table.values()))
    assert type(made.transport.codec) is next(iter(CODEC.table.values()))


def test_a_setting_is_an_instance_with_its_options() -> None:
    made = read("cohort.kind=uniform", "cohort.count=2", "transport.codec=int8", "algorithm=fewfedpit")
    assert made.cohort == Uniform(count=2)
    assert made.transport.codec == Int8()
    assert made.algorithm == FewFedPIT()


def test_an_instance_may_be_given_where_a_choice_is_read() -> None:
    assert read().with_(algorithm=LocalOnly()).algorithm == LocalOnly()


def test_an_instance_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(ConfigError, match="algorithm: expected plain values only"):
        read().with_(algorithm=FedAvg(aggregate=lambda updates, zero: {}))


def test_options_may_come_before_the_choice_is_named_in_the_file() -> None:
    made = read(text='[data.partition]\nalpha = 0.3\nkind = "dirichlet"').data.partition
    assert made == Dirichlet(alpha=0.3)


def test_a_choice_may_be_an_option_of_another() -> None:
    assert read("algorithm.server_optimizer.lr=0.5").algorithm == FedAvg(server_optimizer=SGD(lr=0.5))


@pytest.mark.parametrize("choice", [ALGORITHM, COHORT, CODEC, PARTITION, SYNTHESIS], ids=lambda c: c.tag)
def test_every_choice_reads_what_it_writes(choice: OneOf) -> None:
    for name, cls in choice.table.items():
        assert choice.read(choice.plain(cls())) == cls()
        assert choice.name(cls()) == name


def test_an_alias_is_read_and_its_canonical_name_is_written() -> None:
    made = read("algorithm=ppfedit", "algorithm.keep=3")
    assert made.algorithm == FewFedPIT(keep=3)
    assert made.plain()["algorithm"]["name"] == "fewfedpit"


def test_an_algorithm_checks_its_options_when_the_file_is_read() -> None:
    assert "private_share in [0, 1], got 2.0" in refusal("algorithm=fewfedpit", "algorithm.private_share=2")


def test_functions_are_no_settings() -> None:
    assert "algorithm.aggregate: there is no such key" in refusal("algorithm.aggregate=1")


def test_tools_of_a_client_are_no_settings() -> None:
    assert "algorithm.synthesize: there is no such key" in refusal(
        "algorithm=fewfedpit", "algorithm.synthesize=1"
    )


@pytest.mark.parametrize("value", ["3", "[1]", "{ kind = 3 }", '{ kind = ["all"] }'])
def test_a_value_that_names_no_class_is_refused(value: str) -> None:
    assert "cohort: expected kind = one of all, uniform" in refusal(f"cohort={value}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.server_optimizer.lrr=1"], "algorithm.server_optimizer.lrr: there is no such key; did you mean 'lr'?"),
        (["algorithm=fewfedpit", "algorithm.kep=1"], "algorithm.kep: there is no such key; did you mean 'keep'?"),
        (["algorithm=fewfedpit", "algorithm.server_optimizer.lrr=1"], "server_optimizer.lrr: there is no such key; did you mean 'lr'?"),
        (["compare.methods.A=fewfedpit", "compare.methods.A.kep=1"], "compare.methods.A.kep: there is no such key; did you mean 'keep'?"),
        (["synthesis.filters.shorest=3"], "synthesis.filters.shorest: there is no such key; did you mean 'shortest'?"),
        (["synthesis.wording.item_ent=x"], "synthesis.wording.item_ent: there is no such key; did you mean 'item_end'?"),
        (["synthesis.wording.style=embeded"], "synthesis.wording: expected style = one of embedded, self_instruct; got 'embeded'; did you mean 'embedded'?"),
        (["transport.codec.name=int8", "transport.codec.blok=3"], "transport.codec.blok: there is no such key; did you mean 'block'?"),
        (["judge.by.kind=endpoint", "judge.by.urll=x"], "judge.by.urll: there is no such key; did you mean 'url'?"),
        (["algorithm=ppfedi"], "algorithm: expected name = one of"),
    ],
)  # fmt: skip
def test_a_mistake_at_any_depth_is_named_with_its_key(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)
