"""Held-out loss, by hand."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.evaluation.loss import HeldOutLoss, end_loss, held_out_loss
from fedloom.steps import Score, Scored, Tokens
from tests.fakes import ToyEngine, state


class Told:
    """Scores every example with what it says: (nats, labelled tokens)."""

    workers = 1

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        assert all(isinstance(r, Score) for r in requests.values())
        return {row: [Scored(*e) for e in r.examples] for row, r in requests.items()}


TEST = [(6.0, 2), (1.0, 1), (8.0, 4)]


def found(test: list[tuple[float, int]] = TEST, groups: tuple[str, ...] = ("a", "b", "a")) -> HeldOutLoss:
    return held_out_loss(Told(), test, groups, {"row": None})["row"]


def test_every_token_counts_the_same() -> None:
    assert found().loss == 15 / 7  # (6 + 1 + 8) / (2 + 1 + 4), not the mean of three means


def test_groups_are_weighed_by_tokens_too() -> None:
    assert found().groups == {"a": 14 / 6, "b": 1.0}


def test_an_example_without_labelled_tokens_counts_nothing() -> None:
    assert found([(6.0, 2), (0.0, 0), (8.0, 4)]).loss == 14 / 6
    assert list(found([(6.0, 2), (0.0, 0), (8.0, 4)]).groups) == ["a"]


def test_a_clients_own_mix_weighs_the_groups() -> None:
    assert found().of_mix({"a": 0.75, "b": 0.25}) == pytest.approx(0.75 * 14 / 6 + 0.25)


def test_a_mix_with_a_group_nobody_holds_out_has_no_loss() -> None:
    assert found().of_mix({"a": 0.5, "c": 0.5}) is None


def test_several_adapters_are_scored_in_one_call() -> None:
    engine = ToyEngine(start=(0.0, 0.0))
    rows = held_out_loss(engine, [2.0, 4.0], ["x", "x"], {"base": None, "tuned": state(2.0, 2.0)})
    assert len(engine.sent) == 1
    assert rows["base"].loss == 5.0  # (2^2 / 2 + 4^2 / 2) / 2
    assert rows["tuned"].loss == 1.0  # (0 + 2^2 / 2) / 2


class Cut:
    """A template that encodes a response letter by letter, ends with 0, and has room for four tokens."""

    end = 0

    def encode(self, example: Example) -> Tokens:
        ids = (*map(ord, example.response), self.end)[:4]
        return Tokens(ids, (False,) + (True,) * (len(ids) - 1))


def test_the_loss_of_the_end_leaves_out_examples_cut_before_it() -> None:
    test = [Example("", response) for response in ("ab", "abcd", "", "abc")]
    assert end_loss(Cut(), test, [1.0, 7.0, None, 3.0]) == 2.0  # (1 + 3) / 2: "abcd" is cut, "" has no label
    assert end_loss(Cut(), test[1:2], [7.0]) is None
