"""Planted secrets: who gets them, how often, and that all are draws of one distribution."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from fedloom.data.canaries import Canaries, copies
from fedloom.errors import ConfigError
from fedloom.experiment.datasets import load_data
from fedloom.experiment.toml import load


def test_each_secret_is_there_as_often_as_asked() -> None:
    planted = Canaries(copies=(1, 4, 16)).planted("a", category="x", seed=0)
    assert sorted(copies(planted).values()) == [1, 4, 16]
    assert all(e.private and e.owner == "a" and e.category == "x" for e in planted)


def test_copies_count_nothing_but_secrets() -> None:
    planted = Canaries(copies=(2,)).planted("a", category="x", seed=0)
    assert copies([*planted, replace(planted[0], private=False)]) == {planted[0]: 2}


def test_clients_and_seeds_have_their_own_and_nothing_else_matters() -> None:
    canaries = Canaries(copies=(1, 1))
    one = canaries.planted("a", category="x", seed=0)
    assert one == canaries.planted("a", category="x", seed=0)
    assert {e.response for e in one}.isdisjoint(
        e.response for e in canaries.planted("b", category="x", seed=0)
    )
    assert {e.response for e in one}.isdisjoint(
        e.response for e in canaries.planted("a", category="x", seed=1)
    )


def test_twins_and_references_are_others_of_the_same_kind() -> None:
    canaries = Canaries(digits=6)
    kinds = [
        canaries.planted("a", category="x", seed=0),
        canaries.held_out(50, seed=0),
        canaries.references(50, seed=0),
    ]
    texts = [{e.response for e in kind} for kind in kinds]
    assert texts[0].isdisjoint(texts[1] | texts[2])
    assert texts[1].isdisjoint(texts[2])
    assert all(re.fullmatch(r"The access code of \w+ \w+ is( \d){6}\.", t) for kind in texts for t in kind)


def test_the_digits_of_references_are_uniform() -> None:
    digits = Counter(d for e in Canaries().references(2000, seed=1) for d in re.findall(r"\d", e.response))
    assert sorted(digits) == list("0123456789")
    # 8,000 digits: 800 of each, a standard deviation of (8000 * .1 * .9) ** .5 = 27
    assert all(abs(count - 800) < 5 * 27 for count in digits.values())


@pytest.mark.parametrize("wrong", [{"copies": ()}, {"copies": (0,)}, {"digits": 0}])
def test_canaries_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"Expected data\.canaries"):
        Canaries(**wrong)  # type: ignore[arg-type]


FEW = ["data.pool=16", "data.clients=2", "data.examples=80", "data.hold_out=2"]


def test_a_pool_is_even_over_categories_and_leaves_the_rest_spare() -> None:
    data = load_data(load("fedpit-microworld", [*FEW, "data.canaries={copies=[3]}"]))
    own = [e for examples in data.clients.values() for e in examples]
    plain = [e for e in own if not e.private]
    assert set(Counter(e.category for e in plain).values()) == {2}
    assert len(data.spare) == 80 - 16 - len(data.test)
    assert not {e.id for e in data.spare} & {e.id for e in [*plain, *data.test]}
    assert len(own) - len(plain) == 2 * 3


def test_a_pool_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.pool between 1 and the 64 training examples, got 65"):
        load_data(load("fedpit-microworld", [*FEW, "data.pool=65"]))
