from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from fedloom.attacks.membership import (
    AtRate,
    Membership,
    at_rate,
    auc,
    lowest,
    membership,
    scores,
    separation,
)
from fedloom.data.example import Example
from fedloom.errors import DataError, ModelError
from fedloom.steps import Score, Scored, TokenScores
from tests.attacks.overfitted import overfitted

FIVE = TokenScores(logp=(-1.0, -2.0, -8.0, -3.0, -0.5), mean=(-2.0,) * 5, std=(1.0, 2.0, 3.0, 0.5, 1.0))


def separated(members: list[float], nonmembers: list[float]) -> Membership:
    return separation(members, nonmembers)


def at(members: list[float], nonmembers: list[float], target: float) -> AtRate:
    return at_rate(np.array(members), np.array(nonmembers), target=target)


def test_auc_counts_pairs_and_half_of_ties() -> None:
    """3 against (1, 2, 3): two wins, one tie; 2: one win, one tie. (2.5 + 1.5) / 6."""
    assert auc(np.array([3.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(4 / 6)


def test_equal_scores_are_chance() -> None:
    assert separated([1.0] * 5, [1.0] * 7).auc == 0.5


def test_reversed_roles_reverse_auc_and_interval() -> None:
    one, other = separated([1.0, 3.0, 4.0], [0.0, 2.0]), separated([0.0, 2.0], [1.0, 3.0, 4.0])
    assert one.auc == pytest.approx(1 - other.auc)
    assert one.auc_ci95 == pytest.approx([1 - x for x in other.auc_ci95[::-1]], abs=1e-9)


def test_a_perfect_auc_of_few_records_is_not_certain() -> None:
    assert separated([1.0] * 64, [0.0] * 64).auc_ci95 == (pytest.approx(0.969, abs=1e-3), 1.0)
    assert separated([0.0] * 3, [1.0] * 2).auc_ci95[0] == 0.0
    assert separated([0.0] * 3, [1.0] * 2).auc_ci95[1] > 0.5


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_interval_covers_the_true_auc_19_times_of_20(shift: float) -> None:
    """300 draws: 95% less 3 standard errors is 273. The AUC of normals at distance d is Phi(d / sqrt 2)."""
    rng, truth = np.random.default_rng(0), norm.cdf(shift / 2**0.5)
    found = [separation(rng.normal(shift, 1, 64), rng.normal(0, 1, 64)).auc_ci95 for _ in range(300)]
    assert sum(low <= truth <= high for low, high in found) >= 273


def test_the_threshold_lets_through_what_the_rate_allows() -> None:
    """200 non-members at 1%: two may pass, so the threshold is the third highest, 197."""
    found = at([197.0, 197.5, 198.5, 300.0], [float(x) for x in range(200)], 0.01)
    assert (found.fpr.hits, found.fpr.of) == (2, 200)
    assert (found.tpr.hits, found.tpr.of) == (3, 4)


def test_few_nonmembers_allow_no_false_positive() -> None:
    found = at([63.0, 63.5], [float(x) for x in range(64)], 0.001)
    assert (found.tpr.hits, found.fpr.hits) == (1, 0)
    assert found.fpr.ci95[1] == pytest.approx(1 - 0.025 ** (1 / 64))  # 5.6%: what 64 can tell


def test_tied_nonmembers_never_exceed_the_rate() -> None:
    found = at([1.0, 2.0], [0.0] * 95 + [1.0] * 5, 0.01)
    assert (found.fpr.hits, found.tpr.hits) == (0, 1)


def test_a_rate_that_divides_the_nonmembers_is_met_exactly() -> None:
    for n in (100, 700, 2900):  # 0.01 * 700 is 7.000000000000001 in floats, 0.01 * 2900 is 29.0
        assert at([1.0], [float(x) for x in range(n)], 0.01).fpr.hits == n // 100


def test_scores_of_one_record_by_hand() -> None:
    tuned, base = Scored(14.5, 5, tokens=FIVE), Scored(20.0, 5)
    found = scores(tuned, base, compressed=29)
    assert found == pytest.approx(
        {
            "loss": -2.9,  # 14.5 / 5
            "reference": 1.1,  # 20 / 5 - 2.9
            "zlib": -0.1,  # -2.9 / 29
            "min_k": -8.0,  # the lowest fifth of five is one
            "min_k_plus": -2.0,  # (1, 0, -2, -2, 1.5): (-8 + 2) / 3
        }
    )


def test_the_lowest_fifth_is_at_least_one_token() -> None:
    assert lowest([-1.0, -3.0, -2.0]) == -3.0
    assert lowest([float(x) for x in range(10)]) == 0.5  # (0 + 1) / 2


def test_a_certain_token_is_no_surprise() -> None:
    sure = Scored(0.0, 1, tokens=TokenScores((0.0,), (0.0,), (0.0,)))
    assert scores(sure, sure, compressed=8)["min_k_plus"] == 0.0


class Table:
    """Scores from a table: (adapter, record) -> nats of a single token."""

    def __init__(self, losses: dict[Any, float]):
        self.losses = losses
        self.asked: list[Any] = []

    def answer(self, requests: Any) -> Any:
        self.asked.append(requests)
        return {key: [self._one(r, e) for e in r.examples] for key, r in requests.items()}

    def _one(self, request: Score, example: Example) -> Scored:
        loss = self.losses[request.adapter, example.response]
        tokens = TokenScores((-loss,), (-1.0,), (1.0,)) if request.per_token else None
        return Scored(loss, 1, tokens=tokens)


def record(text: str) -> Example:
    return Example("?", text)


def test_several_adapters_are_attacked_in_one_request_to_the_engine() -> None:
    losses = {(None, "in"): 3.0, (None, "out"): 2.0, ("tuned", "in"): 1.0, ("tuned", "out"): 2.0}
    table = Table(losses)
    found = membership(table, [record("in")], [record("out")], {"base": None, "round 3": "tuned"})  # type: ignore[dict-item]
    assert len(table.asked) == 1
    assert {row: {name: m.auc for name, m in of.items()} for row, of in found.items()} == {
        "base": {"loss": 0.0, "reference": 0.5, "zlib": 0.0, "min_k": 0.0, "min_k_plus": 0.0},
        "round 3": {"loss": 1.0, "reference": 1.0, "zlib": 1.0, "min_k": 1.0, "min_k_plus": 1.0},
    }


def test_zlib_compresses_the_text_it_is_told_to() -> None:
    """The same loss of 1 for both; the member's text is longer, so less of it falls on a byte."""
    losses = {(a, r): 1.0 for a in (None, "tuned") for r in ("a", "b")}
    seen: list[str] = []

    def text(example: Example) -> str:
        seen.append(example.response)
        return {"a": "a text that zlib cannot shorten much", "b": "short"}[example.response]

    found = membership(Table(losses), [record("a")], [record("b")], {"x": "tuned"}, text=text)  # type: ignore[dict-item]
    assert seen == ["a", "b"]
    assert (found["x"]["zlib"].auc, found["x"]["loss"].auc) == (1.0, 0.5)
    assert len(zlib.compress(text(record("a")).encode())) > len(zlib.compress(text(record("b")).encode()))


def test_results_are_plain_for_json() -> None:
    plain = separated([2.0, 1.0], [0.0]).plain()
    assert json.loads(json.dumps(plain))["at"][0]["tpr"]["value"] == 1.0


@pytest.mark.parametrize(("members", "nonmembers"), [([], [1.0]), ([1.0], [])])
def test_without_members_or_nonmembers_there_is_nothing_to_separate(members: Any, nonmembers: Any) -> None:
    with pytest.raises(DataError, match="Expected members and non-members"):
        separation(members, nonmembers)


def test_a_diverged_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="diverged"):
        separation([math.nan], [1.0])


def test_a_record_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no token"):
        scores(Scored(0.0, 0, tokens=TokenScores((), (), ())), Scored(0.0, 0), compressed=8)


def test_rounding_is_not_ranked() -> None:
    """Losses that two batches would compute a little differently tie; a difference that means something does not."""
    tokens = TokenScores((-1.0,), (-1.0,), (1.0,))
    before = Scored(3.0, 1)
    references = [
        scores(Scored(n, 1, tokens=tokens), before, compressed=8)["reference"]
        for n in (3.000001, 2.999998, 2.9999)
    ]
    assert references == [0.0, 0.0, 0.0001]


def test_an_overfitted_model_gives_its_members_away_and_an_untrained_one_tells_what_the_base_does() -> None:
    known = overfitted()
    rows = {"base": None, **known.adapters}
    found = membership(known.engine, known.members, known.held_out, rows)
    assert {n: m.auc for n, m in found["untrained"].items()} == {n: m.auc for n, m in found["base"].items()}
    assert found["base"]["reference"].auc == 0.5  # the base against itself
    assert all(m.auc > found["base"][name].auc for name, m in found["overfitted"].items())
    assert found["overfitted"]["reference"].auc == 1.0
    assert found["overfitted"]["reference"].at[0].tpr.value == 1.0
    assert min(m.auc for m in found["overfitted"].values()) >= 0.9
