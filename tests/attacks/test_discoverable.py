"""Whether the beginning of a trained text brings back its end."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any

import pytest

from fedloom.attacks.discoverable import Cut, cut, discover, extractable, greedy
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Generate, Score, Scored, Tokens
from tests.attacks.overfitted import overfitted
from tests.fakes import numbers, state

END = 2


def record(prompt: int, learnt: int, *, ended: bool = True) -> Tokens:
    """Tokens 100, 101, ..., of which the last `learnt` are labelled, and the end token."""
    ids = (*range(100, 100 + prompt + learnt), *([END] if ended else []))
    return Tokens(ids, (False,) * prompt + (True,) * (len(ids) - prompt))


# Where a record is cut


def test_a_long_text_is_cut_after_fifty_tokens_and_the_next_fifty_are_the_secret() -> None:
    found = cut(record(1, 300), end=END)
    assert found == Cut(tuple(range(100, 151)), tuple(range(151, 201)))  # the opening and 50, then 50


def test_a_short_text_is_cut_in_half_after_its_whole_prompt() -> None:
    found = cut(record(30, 20), end=END)
    assert found == Cut(tuple(range(100, 140)), tuple(range(140, 150)))


def test_half_of_an_odd_text_leaves_the_longer_half_known() -> None:
    assert len(cut(record(3, 21), end=END).suffix) == 10  # type: ignore[union-attr]


def test_a_secret_has_eight_tokens_at_least_and_takes_them_from_the_prefix() -> None:
    assert [len(cut(record(5, n), end=END).suffix) for n in (8, 10, 16, 18)] == [8, 8, 8, 9]  # type: ignore[union-attr]


def test_a_text_too_short_for_a_secret_is_left_out() -> None:
    assert cut(record(5, 7), end=END) is None
    assert cut(record(5, 7), end=END, shortest=7) is not None
    assert cut(Tokens((1, 2, 3), (False,) * 3), end=END) is None  # nothing was learnt


def test_the_token_that_ends_an_answer_is_no_secret() -> None:
    assert cut(record(4, 20), end=END) == cut(record(4, 20, ended=False), end=END)


def test_only_the_secret_is_scored() -> None:
    assert Cut((5, 6), (7,)).scored() == Tokens((5, 6, 7), (False, False, True))


# (n, p)


@pytest.mark.parametrize("p_z", [Fraction(1, 2), Fraction(1, 100), Fraction(999, 1000), Fraction(1, 10**6)])
@pytest.mark.parametrize("n", [1, 2, 69, 70, 100])
@pytest.mark.parametrize("p", [Fraction(1, 2), Fraction(9, 10)])
def test_extractable_agrees_with_exact_arithmetic(p_z: Fraction, n: int, p: Fraction) -> None:
    exact = 1 - (1 - p_z) ** n
    if exact != p:  # on the very limit the logarithm's rounding decides
        assert extractable(-math.log(p_z), n, float(p)) == (exact >= p)


def test_chances_below_the_spacing_of_floats_around_one_still_count() -> None:
    nll = 20 * math.log(10)  # p_z = 1e-20, and 1 - p_z == 1.0 in floats
    assert extractable(nll, 10**20, 0.6)  # 1 - 1/e = 0.632
    assert not extractable(nll, 10**20, 0.64)


def test_the_ends_of_the_scale() -> None:
    assert extractable(0.0, 1, 0.999)
    assert extractable(1e-12, 1, 1 - 1e-9)
    assert not extractable(1e4, 10_000, 0.5)  # exp(-10,000) is 0
    assert not extractable(math.inf, 10_000, 0.5)
    assert not extractable(math.nan, 10_000, 0.5)


# The attack


class Tokenized:
    """A template that has its tokens from the instruction, as numbers."""

    end = END

    def encode(self, example: Example) -> Tokens:
        return record(3, int(example.response))


class Sure:
    """Gives every secret the loss its adapter names, and says it iff that is 0."""

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {key: self._score(r) if isinstance(r, Score) else self._say(r) for key, r in requests.items()}

    def _loss(self, adapter: AdapterState | None) -> float:
        return 50.0 if adapter is None else numbers(adapter)[0]

    def _score(self, request: Score) -> list[Scored]:
        return [Scored(self._loss(request.adapter), t.targets) for t in request.examples]

    def _say(self, request: Generate) -> list[list[int]]:
        step = 1 if self._loss(request.adapter) == 0 else 2
        return [[p[-1] + step * (i + 1) for i in range(request.max_new_tokens)] for p in request.prompts]


def example(learnt: int) -> Example:
    return Example("Count.", str(learnt))


MEMBERS = [example(20), example(30), example(3)]


def test_shares_at_each_level_stand_beside_the_base() -> None:
    rows = {"sure": state(0.1), "unsure": state(4.0)}  # p_z = 0.905 and 0.018
    found = discover(Sure(), Tokenized(), rows, MEMBERS, [example(40)])  # type: ignore[arg-type]
    hits = {row: [s.hits for s in got.members.shares.values() if s] for row, got in found.items()}
    assert hits == {"base": [0, 0, 0], "sure": [2, 2, 2], "unsure": [0, 2, 2]}  # 1 - 0.982^100 = 0.84
    share = found["sure"].members.shares[1, 0.5]
    assert share is not None
    assert (share.of, share.ci95[1]) == (2, 1.0)


def test_what_was_too_short_is_counted() -> None:
    found = discover(Sure(), Tokenized(), {}, MEMBERS, [example(2)])["base"]  # type: ignore[arg-type]
    assert (found.members.skipped, found.held_out.skipped) == (1, 1)
    assert found.members.targets == (10, 15)
    assert found.held_out.shares[1, 0.5] is None


@pytest.mark.parametrize("level", [(0, 0.5), (1, 0.0), (1, 1.0)])
def test_a_level_that_means_nothing_is_refused(level: tuple[int, float]) -> None:
    with pytest.raises(ConfigError, match=r"levels \(n, p\)"):
        discover(Sure(), Tokenized(), {}, MEMBERS, MEMBERS, levels=[level])  # type: ignore[arg-type]


def test_a_diverged_model_has_no_number_in_json() -> None:
    found = discover(Sure(), Tokenized(), {"nan": state(math.nan)}, MEMBERS, MEMBERS)["nan"]  # type: ignore[arg-type]
    text = json.dumps(found.plain(), allow_nan=False)
    assert json.loads(text)["members"]["nll"] == [None, None]


def test_greedy_counts_suffixes_that_are_said_to_the_token() -> None:
    rows = {"knows": state(0.0), "not": state(1.0)}
    found = greedy(Sure(), Tokenized(), rows, MEMBERS, [example(40)])  # type: ignore[arg-type]
    assert {row: (got.members.hits, got.members.of) for row, got in found.items() if got.members} == {
        "base": (0, 2),
        "knows": (2, 2),
        "not": (0, 2),
    }
    assert found["knows"].held_out.hits == 1  # type: ignore[union-attr]


# Conformance: algorithms.md 7.15


def test_an_overfitted_model_is_extractable_and_an_untrained_one_is_not() -> None:
    o = overfitted()
    found = discover(o.engine, o.template, o.adapters, o.members, o.held_out)
    share = {
        (row, group): getattr(got, group).shares
        for row, got in found.items()
        for group in ("members", "held_out")
    }
    assert share["overfitted", "members"][1, 0.5].value >= 0.9
    assert share["overfitted", "held_out"][100, 0.5].value == 0
    assert (
        share["untrained", "members"][10_000, 0.9].value == share["base", "members"][10_000, 0.9].value == 0
    )


def test_greedy_extraction_agrees_with_it() -> None:
    o = overfitted()
    found = greedy(o.engine, o.template, o.adapters, o.members, o.held_out)
    assert found["overfitted"].members.value >= 0.9  # type: ignore[union-attr]
    assert found["overfitted"].held_out.value == 0  # type: ignore[union-attr]
    assert found["untrained"].members.hits == found["base"].members.hits == 0  # type: ignore[union-attr]


def test_the_chance_of_a_suffix_is_how_often_sampling_says_it() -> None:
    o = overfitted()
    own = o.template.encode(o.members[0])
    short = cut(own, end=o.template.end)
    assert short is not None
    adapter = o.adapters["overfitted"]
    nll = o.engine.answer({0: Score([short.scored()], adapter)})[0][0].nll
    request = Generate([short.prefix] * 200, adapter, max_new_tokens=len(short.suffix), temperature=1.0)
    said = sum(tuple(ids) == short.suffix for ids in o.engine.answer({0: request})[0]) / 200
    p_z = math.exp(-nll)
    assert abs(said - p_z) <= 4 * math.sqrt(p_z * (1 - p_z) / 200) + 1e-3
