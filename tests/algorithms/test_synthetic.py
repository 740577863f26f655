"""Choosing among candidates by the instruction-following score."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from fedloom.algorithms.synthetic import Judged, judge, ranked
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Score, Scored, Tokens
from tests.fakes import run_alone, state


class Scoring:
    """Answers with the numbers the examples are: (nats, targets)."""

    def answer(self, requests: Any) -> Any:
        return {key: [Scored(*e) for e in r.examples] for key, r in requests.items()}


def judged(*pairs: tuple[tuple[float, int], tuple[float, int]]) -> list[Judged]:
    """Of candidates that are (given, alone)."""
    return run_alone(judge(pairs, state(1.0), lambda pair: pair), Scoring())


def some(n: int, seed: int = 0) -> list[Judged]:
    draw = random.Random(seed)
    return [
        Judged(draw.choice([0.5, 1.0, 1.5]), draw.choice([1.0, 2.0]), usable=draw.random() < 0.8)
        for _ in range(n)
    ]


def test_the_score_is_the_ratio_of_mean_losses() -> None:
    [one] = judged(((6.0, 4), (12.0, 4)))
    assert (one.given, one.alone, one.ratio) == (1.5, 3.0, 0.5)
    assert one.usable


@pytest.mark.parametrize(
    ("given", "alone"),
    [
        ((math.nan, 4), (1.0, 4)),
        ((1.0, 4), (math.nan, 4)),
        ((math.inf, 4), (1.0, 4)),
        ((1.0, 3), (1.0, 3)),  # too short
        ((0.0, 0), (0.0, 0)),
        ((1.0, 4), (0.0, 4)),  # nothing to compare with
        ((1.0, 5), (1.0, 4)),  # not the same response
    ],
)
def test_a_score_that_means_nothing_makes_a_candidate_unusable(given: Any, alone: Any) -> None:
    [one] = judged((given, alone))
    assert not one.usable
    assert ranked([one], "ifs") == ranked([one], "first") == []


def test_four_tokens_are_enough() -> None:
    assert judged(((1.0, 4), (1.0, 4)))[0].usable


@pytest.mark.parametrize("seed", range(20))
def test_ifd_is_ifs_reversed_even_among_equals(seed: int) -> None:
    candidates = some(12, seed)
    assert ranked(candidates, "ifd") == ranked(candidates, "ifs")[::-1]


@pytest.mark.parametrize("rule", ["ifs", "ifd", "perplexity", "first"])
def test_every_rule_ranks_exactly_the_usable_candidates(rule: Any) -> None:
    candidates = some(30)
    assert sorted(ranked(candidates, rule)) == [i for i, j in enumerate(candidates) if j.usable]


def test_ifs_prefers_what_the_instruction_helps_most_and_perplexity_what_is_likely() -> None:
    likely, helped = Judged(1.0, 1.1, True), Judged(2.0, 8.0, True)
    assert ranked([likely, helped], "ifs") == [1, 0]
    assert ranked([likely, helped], "perplexity") == [0, 1]


def test_a_rule_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="ifs, ifd, perplexity or first"):
        ranked([], "random")  # type: ignore[arg-type]


def test_nothing_to_judge_asks_nobody() -> None:
    assert run_alone(judge([], state(1.0), lambda pair: pair), None) == []


def test_the_scorer_is_whom_it_was_told() -> None:
    scorer: AdapterState = state(7.0)
    request = next(judge([1], scorer, lambda _: (Tokens((1, 2), (False, True)),) * 2))
    assert isinstance(request, Score)
    assert request.adapter is scorer
