from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedloom.attacks.exposure import (
    Pool,
    exposure_by_rank,
    exposures,
    exposures_by_extrapolation,
    no_leak_bound,
    p_value,
)
from fedloom.data.example import Example
from fedloom.data.microworld import private_facts
from fedloom.errors import DataError, ModelError
from fedloom.steps import Scored
from tests.attacks.overfitted import overfitted

SIXTEEN = [float(x) for x in range(1, 17)]


@pytest.mark.parametrize(("loss", "bits"), [(0.0, 4.0), (0.1, 4.0), (3.5, 2.0), (20.0, math.log2(16 / 17))])
def test_exposure_by_rank_is_that_of_tensorflow_privacy(loss: float, bits: float) -> None:
    """tensorflow/privacy, secret_sharer/exposures_test.py: references 1 to 16; 3.5 comes fourth, 4 - 2 bits."""
    assert exposure_by_rank(loss, SIXTEEN) == pytest.approx(bits, abs=1e-12)


def test_a_tie_counts_against_a_canarys_being_known() -> None:
    assert exposure_by_rank(1.0, SIXTEEN) == 3.0  # second of 16
    assert exposure_by_rank(1.0, [1.0] * 15) == pytest.approx(math.log2(15 / 16))


def test_extrapolation_agrees_with_the_law_the_references_were_drawn_from() -> None:
    references = stats.skewnorm.rvs(4, size=10_000, random_state=0)
    losses = [0.0, 0.5, 1.0, 2.0]
    expected = -np.log2(stats.skewnorm.cdf(losses, 4))  # 3.68, 1.38, 0.55, 0.07
    assert exposures_by_extrapolation(losses, references) == pytest.approx(expected, abs=0.1)


def test_extrapolation_sees_beyond_the_ceiling_of_ranks() -> None:
    references = np.random.default_rng(0).normal(20, 2, size=256)
    near, far = exposures_by_extrapolation([10.0, 8.0], references)
    assert near is not None
    assert far is not None
    assert 8 < near < far < 50
    assert exposures_by_extrapolation([-100.0], references) == [50.0]


def test_references_that_do_not_vary_extrapolate_to_nothing() -> None:
    assert exposures_by_extrapolation([1.0, 2.0], [3.0] * 100) == [None, None]


def test_the_bound_for_64_canaries_is_the_specified_one() -> None:
    assert no_leak_bound(64) == pytest.approx(1.74, abs=0.005)  # 1.4427 (1 + 1.645 / 8)


def test_unseen_canaries_pass_the_bound_and_the_test_19_times_of_20() -> None:
    """500 draws of 64 canaries in pools of 512: at most 5.7% and 5%, plus 3 standard errors: 44 and 39."""
    rng = np.random.default_rng(0)
    drawn = [
        [exposure_by_rank(x, references) for x in rng.random(64)]
        for references in (rng.random(512) for _ in range(500))
    ]
    assert np.mean(drawn) == pytest.approx(1.4427, abs=0.03)
    assert sum(np.mean(bits) > no_leak_bound(64) for bits in drawn) <= 44
    assert sum(p_value(bits) < 0.05 for bits in drawn) <= 39


def test_the_p_value_of_one_canary_halves_with_every_bit() -> None:
    assert [p_value([bits]) for bits in (0.0, 1.0, 5.0)] == pytest.approx([1.0, 1 / 2, 1 / 32])


def secret(number: float) -> Example:
    return Example("My code?", str(number))


class Losing:
    """A loss for every (adapter, number)."""

    def __init__(self, loss: Callable[[Any, float], float]):
        self.loss = loss
        self.asked: list[Any] = []

    def answer(self, requests: Any) -> Any:
        self.asked.append(requests)
        return {
            key: [Scored(self.loss(r.adapter, float(e.response)), 4) for e in r.examples]
            for key, r in requests.items()
        }


def pool(planted: list[float], held_out: list[float], references: list[float]) -> Pool:
    return Pool([secret(x) for x in planted], [secret(x) for x in held_out], [secret(x) for x in references])


def test_each_reference_is_scored_once_an_adapter_and_all_adapters_in_one_call() -> None:
    engine = Losing(lambda adapter, x: x)
    exposures(engine, [pool([0.5, 3.5], [20.0], SIXTEEN)], {"a": "first", "b": "second", "c": None})  # type: ignore[dict-item]
    [asked] = engine.asked
    assert [len(request.examples) for request in asked.values()] == [19, 19, 19]  # base, which is c, a, b


def test_planted_and_held_out_are_ranked_in_their_own_pool() -> None:
    """Two templates whose losses lie 100 apart: pooled, one template's canaries would all look known."""
    engine = Losing(lambda adapter, x: x)
    pools = [pool([0.5, 3.5], [20.0], SIXTEEN), pool([100.5], [103.5, 120.0], [100 + x for x in SIXTEEN[:8]])]
    found = exposures(engine, pools, {"row": "tuned"})["row"]["loss"]  # type: ignore[dict-item]
    assert found.planted.bits == pytest.approx((4.0, 2.0, 3.0))
    assert found.held_out.bits == pytest.approx((math.log2(16 / 17), 1.0, math.log2(8 / 9)))
    assert (found.references, found.ceiling) == (8, 3.0)
    assert found.planted.mean == pytest.approx(3.0)


def test_a_canary_that_is_likely_anyway_stands_out_by_loss_but_not_calibrated() -> None:
    """Under the base a secret costs its number; tuning takes 1 off everything but 9 off the secret 15.5."""
    engine = Losing(lambda adapter, x: x if adapter is None else x - (9 if x == 15.5 else 1))
    found = exposures(engine, [pool([0.5, 15.5], [], SIXTEEN)], {"row": "tuned"})["row"]  # type: ignore[dict-item]
    assert found["loss"].planted.bits == pytest.approx((4.0, 4 - math.log2(8)))  # 6.5 comes after 0 to 6
    assert found["calibrated"].planted.bits == pytest.approx((math.log2(16 / 17), 4.0))


def test_the_base_is_ranked_by_loss_and_calibrates_to_nothing() -> None:
    engine = Losing(lambda adapter, x: x)
    found = exposures(engine, [pool([0.5], [3.5], SIXTEEN)], {"base": None})["base"]
    assert found["loss"].planted.bits == pytest.approx((4.0,))
    assert found["calibrated"].planted.bits == pytest.approx((math.log2(16 / 17),))
    assert found["calibrated"].planted.extrapolated == (None,)


def test_a_reference_that_equals_a_canary_is_left_out() -> None:
    """Otherwise the canary would tie with itself. Who owns it makes no difference."""
    mine = replace(secret(1.0), owner="a", id="canary:a:0")
    found = exposures(
        Losing(lambda adapter, x: x), [Pool([mine], [], [secret(x) for x in SIXTEEN])], {"row": None}
    )["row"]["loss"]
    assert found.references == 15
    assert found.planted.bits == pytest.approx((math.log2(15),))


def test_without_held_out_twins_there_is_no_control() -> None:
    found = exposures(Losing(lambda adapter, x: x), [pool([0.5], [], SIXTEEN)], {"row": None})["row"]["loss"]
    assert (found.held_out.mean, found.held_out.p_value, found.held_out.leaks) == (None, None, False)


def test_results_are_plain_for_json() -> None:
    found = exposures(Losing(lambda adapter, x: x), [pool([0.5] * 9, [20.0], SIXTEEN)], {"row": None})["row"][
        "loss"
    ]
    plain = json.loads(json.dumps(found.plain()))
    assert (plain["leaks"], plain["planted"]["bits"], plain["ceiling"]) == (True, [4.0] * 9, 4.0)


@pytest.mark.parametrize("pools", [[], [pool([1.0], [], [1.0])]])
def test_nothing_to_rank_among_is_refused(pools: list[Pool]) -> None:
    with pytest.raises(DataError):
        exposures(Losing(lambda adapter, x: x), pools, {"row": None})


def test_a_diverged_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="diverged"):
        exposures(Losing(lambda adapter, x: math.nan), [pool([0.5], [], SIXTEEN)], {"row": "tuned"})  # type: ignore[dict-item]


def test_secrets_known_by_heart_are_fully_exposed_and_their_twins_are_not() -> None:
    known = overfitted()
    mine = Pool(known.members, known.held_out, private_facts("references", 128))
    found = exposures(known.engine, [mine], {"base": None, **known.adapters})
    for score in ("loss", "calibrated"):
        tuned = found["overfitted"][score]
        assert tuned.planted.mean == pytest.approx(tuned.ceiling, abs=0.1), score
        assert tuned.planted.leaks
        assert tuned.planted.p_value is not None
        assert tuned.planted.p_value < 1e-6  # six canaries of seven bits
        assert not tuned.held_out.leaks
    base = found["base"]["loss"].planted.p_value
    assert base is not None
    assert (
        base > 0.01
    )  # these ten drew secrets that the base happens to like: 0.054, and 2.2 bits in the mean
    assert not found["untrained"]["calibrated"].planted.leaks
