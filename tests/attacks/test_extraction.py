"""What comes back of the answers a model was trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedloom.attacks.extraction import extract
from fedloom.attacks.targets import draw, with_base
from fedloom.data.example import Example
from fedloom.errors import ConfigError, DataError
from fedloom.rows import BASE
from fedloom.state import AdapterState
from fedloom.statistics import difference, mean
from fedloom.steps import Generate, Tokens
from tests.attacks.overfitted import overfitted
from tests.data.many_scripts import TEXTS
from tests.fakes import state


class Words:
    """A template whose tokens are words."""

    stop = frozenset({"."})

    def contrast(self, example: Example) -> tuple[Tokens, Tokens]:
        before, after = example.instruction.split(), [*example.response.split(), "."]
        ids: Any = (*before, *after)
        return Tokens(ids, (False,) * len(before) + (True,) * len(after)), Tokens((), ())

    def decode(self, ids: Any) -> str:
        return " ".join(ids)


@dataclass
class Parrot:
    """Knows what it is given to say: by adapter, by prompt."""

    says: Mapping[AdapterState | None, Mapping[str, str]]
    asked: list[Mapping[Hashable, Generate]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked.append(requests)
        return {
            key: [self.says[r.adapter].get(" ".join(map(str, p)), "").split() for p in r.prompts]
            for key, r in requests.items()
        }


TUNED = state(1.0)
MEMBERS = [Example("Who ?", "the red fox"), Example("Where ?", "the old mill")]
HELD_OUT = [Example("When ?", "at noon today"), Example("Why ?", "nobody knows it")]
SAYS = {
    TUNED: {"Who ?": "The  red fox", "Where ?": "the mill", "When ?": "at midnight today", "Why ?": "no"},
    None: {"Who ?": "the", "Where ?": "the", "When ?": "at", "Why ?": "no"},
}


def found(**rows: AdapterState | None) -> Any:
    return extract(Parrot(SAYS), Words(), rows, MEMBERS, HELD_OUT, max_new_tokens=8)  # type: ignore[arg-type]


def test_rouge_l_is_averaged_over_the_answers_to_trained_prompts() -> None:
    group = found(tuned=TUNED)["tuned"].members
    assert group.values == pytest.approx((1.0, 0.8))  # 2 * 2 / (3 + 2)
    assert group.rouge_l.mean == pytest.approx(0.9)


@pytest.mark.parametrize("script", TEXTS)
def test_a_near_copy_counts_as_extracted_in_every_script(script: str) -> None:
    text, near, other = TEXTS[script]
    known = [Example(e.instruction, text) for e in (*MEMBERS, *HELD_OUT)]
    says = {TUNED: dict.fromkeys(SAYS[TUNED], near), None: dict.fromkeys(SAYS[None], other)}
    got = extract(Parrot(says), Words(), {"tuned": TUNED}, known[:2], known[2:], max_new_tokens=8)  # type: ignore[arg-type]
    assert min(got["tuned"].members.values) > 0.75
    assert max(got[BASE].members.values) < 0.4


def test_the_delta_to_the_base_is_paired_by_example() -> None:
    group = found(tuned=TUNED)["tuned"].members
    low, high = group.beyond_base.ci95
    assert group.beyond_base.mean == pytest.approx(0.4)  # 1 - 0.5 and 0.8 - 0.5: 0.5 and 0.3
    assert high - low == pytest.approx(2 * 12.7062 * 0.1, rel=1e-4)  # t(1) at 97.5%, times 0.1414 / sqrt 2


def test_held_out_examples_show_what_is_no_memory() -> None:
    got = found(tuned=TUNED)["tuned"]
    assert got.held_out.rouge_l.mean == pytest.approx((2 / 3 + 0) / 2)
    assert got.gap.mean == pytest.approx(0.9 - 1 / 3)
    assert got.memorised.mean == pytest.approx(0.4 - (2 / 3 - 0.5 + 0) / 2)  # what either gains over the base


def test_an_answer_is_exact_but_for_case_and_white_space() -> None:
    got = found(tuned=TUNED)["tuned"]
    assert (got.members.exact.hits, got.members.exact.of) == (1, 2)
    assert got.held_out.exact.hits == 0
    assert got.held_out.exact.ci95 == pytest.approx((0, 1 - math.sqrt(0.025)))


def test_the_untuned_base_is_attacked_though_nobody_asks() -> None:
    assert list(found(tuned=TUNED)) == [BASE, "tuned"]
    assert found()[BASE].members.beyond_base.mean == 0


def test_all_models_are_attacked_in_one_call_greedily_on_the_trained_prompts() -> None:
    engine = Parrot({**SAYS, (other := state(2.0)): {}})
    extract(engine, Words(), {"a": TUNED, "b": other}, MEMBERS, HELD_OUT, max_new_tokens=8)  # type: ignore[arg-type]
    [requests] = engine.asked
    assert {key: r.adapter for key, r in requests.items()} == {BASE: None, "a": TUNED, "b": other}
    assert all(r.temperature == 0 and r.max_new_tokens == 8 for r in requests.values())
    assert requests["a"].prompts[0] == ("Who", "?")


def test_a_tuned_model_cannot_stand_in_for_the_base() -> None:
    with pytest.raises(ConfigError, match="rename it"):
        with_base({BASE: TUNED})


@pytest.mark.parametrize(("members", "held_out"), [([], HELD_OUT), (MEMBERS, [])])
def test_without_members_or_without_a_control_there_is_no_attack(members: Any, held_out: Any) -> None:
    with pytest.raises(DataError, match="members and held-out examples, got"):
        extract(Parrot(SAYS), Words(), {}, members, held_out, max_new_tokens=8)  # type: ignore[arg-type]


def test_results_are_plain_json_without_any_text() -> None:
    text = json.dumps(found(tuned=TUNED)["tuned"].plain(), allow_nan=False)
    assert "beyond_base" in text
    assert "fox" not in text


# Drawing whom to attack


def clients(**sizes: int) -> dict[str, list[Example]]:
    return {c: [Example(f"{c}{i}", "x", owner=c) for i in range(n)] for c, n in sizes.items()}


def test_a_draw_takes_as_many_of_one_client_as_of_another_while_they_last() -> None:
    owners = [e.owner for e in draw(clients(a=50, b=2, c=50), 12, seed=0)]
    assert {c: owners.count(c) for c in "abc"} == {"a": 5, "b": 2, "c": 5}


def test_a_draw_holds_no_example_twice_and_at_most_all() -> None:
    drawn = draw(clients(a=3, b=4), 100, seed=0)
    assert len(drawn) == len({e.instruction for e in drawn}) == 7


def test_a_draw_depends_on_the_seed_and_not_on_the_order_of_clients() -> None:
    both = clients(a=20, b=20)
    assert draw(both, 6, seed=1) == draw(dict(reversed(both.items())), 6, seed=1) != draw(both, 6, seed=2)


def test_no_client_is_always_the_first_to_be_drawn() -> None:
    assert {draw(clients(a=5, b=5), 1, seed=seed)[0].owner for seed in range(10)} == {"a", "b"}


# Intervals of means


def test_a_mean_of_one_value_has_no_interval() -> None:
    assert mean([0.5]).ci95 is None
    assert difference([0.5], [0.1, 0.2]).ci95 is None


def test_a_difference_allows_for_unequal_spreads() -> None:
    low, high = difference([1.0, 3.0, 5.0], [1.0, 1.0]).ci95  # type: ignore[misc]
    # Means 3 and 1; variances 4 and 0, so 4/3 over 2 degrees of freedom: 2 +- 4.3027 * 1.1547
    assert (low, high) == pytest.approx((2 - 4.96825, 2 + 4.96825), rel=1e-4)


def test_values_without_spread_have_a_point_for_an_interval() -> None:
    assert difference([2.0, 2.0], [1.0, 1.0]).ci95 == (1.0, 1.0)


# Conformance: algorithms.md 7.15


def test_an_overfitted_model_gives_its_training_answers_and_an_untrained_one_does_not() -> None:
    o = overfitted()
    got = extract(o.engine, o.template, o.adapters, o.members, o.held_out, max_new_tokens=20)
    assert got["overfitted"].members.exact.value >= 0.9
    assert got["overfitted"].held_out.exact.value == 0  # it has learnt the form of the answer, not the codes
    assert got["overfitted"].memorised.ci95[0] > 0.1
    assert got["untrained"].members.exact.value == got[BASE].members.exact.value == 0
    assert got["untrained"].memorised.mean == 0


def test_gains_that_are_equal_but_for_rounding_are_no_memory() -> None:
    members = [x - y for x, y in ((0.3, 0.1 + 0.2), (0.9, 0.3 + 0.6), (3.3, 1.1 + 2.2))]  # up to 4e-16 apart
    found = difference(members, [0.0, 0.0], magnitude=3.3)
    assert (found.mean, found.ci95, found.constant) == (0.0, (0.0, 0.0), True)
    assert mean(members, magnitude=3.3).ci95 == (0.0, 0.0)
    assert not mean([0.1, 0.2]).constant
