"""The release gate: bounds, both directions, and what few records leave open, by simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedloom.attacks.membership import separation
from fedloom.attacks.release import Limits, best_auc, gate, most_exposed
from fedloom.errors import ConfigError, DataError
from fedloom.statistics import bounded_mean, difference, proportion

CEILING = 9.0  # bits: 512 references
DRAWS = 400
NORMAL = {
    0.85: 1.4657,
    0.7: 0.7416,
    0.5: 0.0,
}  # AUC -> distance of two unit normals, sqrt(2) times the normal quantile


def told(auc: float, records: int, rng: np.random.Generator) -> dict[str, Any]:
    """Membership by one score whose true AUC this is."""
    return separation(rng.normal(NORMAL[auc], 1, records), rng.normal(0, 1, records)).plain()


def plain_auc(auc: float, records: int = 100) -> dict[str, Any]:
    return {"auc": auc, "members": records, "nonmembers": records}


def measured(**public: Any) -> dict[str, Any]:
    return {"positions": {"public": public, "server": {"reason": "not part of this"}}}


def memory(members: list[float], held_out: list[float]) -> dict[str, Any]:
    """Extraction, of a base that scores 0."""
    groups = {"members": members, "held_out": held_out}
    return {
        "released": {
            **{name: {"values": values} for name, values in groups.items()},
            "memorised": {"mean": difference(members, held_out).mean},
        },
        "base": {name: {"values": [0.0] * len(values)} for name, values in groups.items()},
    }


def canaries(bits: list[float], base: list[float] | None = None) -> dict[str, Any]:
    def one(bits: list[float]) -> dict[str, Any]:
        return {"planted": {"bits": bits, "mean": float(np.mean(bits))}, "ceiling": CEILING}

    return {
        "released": {"calibrated": one(bits), "loss": one(bits)},
        "base": {"loss": one(base or [0.0] * len(bits))},
    }


def line(found: dict[str, Any], limits: Limits) -> dict[str, Any]:
    [only] = gate(found, limits)["gate"]
    return only


def share_of(passes: Callable[[np.random.Generator], bool]) -> float:
    rng = np.random.default_rng(0)
    return sum(passes(rng) for _ in range(DRAWS)) / DRAWS


# --- how often a model that is worse than the limit passes -----------------------------------------------


@pytest.mark.parametrize("records", [1, 2, 3, 4, 5, 20, 100])
@pytest.mark.parametrize(("true", "limit"), [(0.85, 0.65), (0.7, 0.65)])
def test_a_model_that_tells_its_members_passes_hardly_ever(true: float, limit: float, records: int) -> None:
    coin = plain_auc(0.5, records)

    def passes(rng: np.random.Generator) -> bool:
        rows = {"released": {"loss": told(true, records, rng)}, "base": {"loss": coin}}
        return line(measured(membership=rows), Limits(auc=limit))["passed"]

    assert share_of(passes) < 0.05


@pytest.mark.parametrize("canaries_in", [1, 3, 5, 20, 64])
@pytest.mark.parametrize("known", [0.35, 0.75])  # share of canaries that are known by heart
def test_a_model_that_knows_canaries_passes_hardly_ever(known: float, canaries_in: int) -> None:
    # Known: 9 bits. Others: exponential of mean 1.44, cut at 9, of which the mean is 1.4257.
    limit = known * CEILING + (1 - known) * 1.4257 - 0.1

    def passes(rng: np.random.Generator) -> bool:
        bits = np.where(
            rng.random(canaries_in) < known,
            CEILING,
            np.minimum(rng.exponential(1.4427, canaries_in), CEILING),
        )
        return line(measured(exposure=canaries(bits.tolist())), Limits(exposure=limit))["passed"]

    assert share_of(passes) < 0.05


@pytest.mark.parametrize("records", [1, 3, 5, 20, 100])
@pytest.mark.parametrize("recited", [0.06, 0.3])  # share of records that come back in full
def test_a_model_that_recites_a_few_records_passes_hardly_ever(recited: float, records: int) -> None:
    def passes(rng: np.random.Generator) -> bool:
        members = (rng.random(records) < recited).astype(float).tolist()
        return line(measured(extraction=memory(members, [0.0] * records)), Limits(extraction=0.05))["passed"]

    assert share_of(passes) < 0.05


@pytest.mark.parametrize("tokens", [1, 3, 5, 20, 100])
def test_an_upload_that_gives_its_tokens_away_passes_hardly_ever(tokens: int) -> None:
    def passes(rng: np.random.Generator) -> bool:
        read = {"inversion": {"recall": rng.binomial(tokens, 0.45) / tokens, "tokens": tokens}}
        return line({"positions": {"public": {}, "server": read}}, Limits(recall=0.4))["passed"]

    assert share_of(passes) < 0.05


def test_harmless_models_pass_where_there_are_records_enough() -> None:
    def passes(rng: np.random.Generator) -> bool:
        found = measured(
            membership={"released": {"loss": told(0.5, 100, rng)}, "base": {"loss": told(0.5, 100, rng)}},
            exposure=canaries(np.minimum(rng.exponential(1.4427, 64), CEILING).tolist()),
            extraction=memory([0.0] * 200, [0.0] * 200),
        )
        return bool(gate(found, Limits(auc=0.65, exposure=3.0, extraction=0.05))["passed"])

    assert share_of(passes) > 0.9


# --- what counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("released", "base", "value"),
    [
        (0.70, 0.55, 0.65),  # what the base tells apart is subtracted: 0.70 - (0.55 - 0.5)
        (0.70, 0.45, 0.70),  # a base that points the other way is not credited
        (0.0, 0.5, 1.0),  # turned round, such a score is never wrong
        (0.30, 0.45, 0.65),  # 0.70 - (0.55 - 0.5)
        (0.5, 0.5, 0.5),
        (0.6, 0.9, 0.5),  # less than the base tells: nothing
    ],
)
def test_an_auc_counts_by_its_distance_from_one_half_beyond_the_base(
    released: float, base: float, value: float
) -> None:
    assert best_auc({"base": {"a": {"auc": base}}, "released": {"a": {"auc": released}}})[1] == pytest.approx(
        value
    )


def test_the_best_of_the_scores_counts() -> None:
    rows = {
        "base": {"a": {"auc": 0.5}, "b": {"auc": 0.8}},
        "released": {"a": {"auc": 0.3}, "b": {"auc": 0.9}},
    }
    assert best_auc(rows) == ("a", pytest.approx(0.7))  # 0.9 - 0.3 is less


def test_an_inverted_auc_fails() -> None:
    rows = {"released": {"loss": plain_auc(0.0)}, "base": {"loss": plain_auc(0.5)}}
    assert not line(measured(membership=rows), Limits(auc=0.65))["passed"]
    assert not line(measured(membership=rows), Limits(auc=0.65, on="estimate"))["passed"]


@pytest.mark.parametrize(
    ("calibrated", "bare", "base", "value"),
    [
        (5.0, 2.0, 1.0, 5.0),
        (2.0, 5.0, 1.0, 5.0),  # a base below chance is not credited
        (2.0, 5.0, 2.4427, 4.0),  # 5 - (2.4427 - 1.4427)
    ],
)
def test_the_score_by_which_a_canary_shows_most_counts(
    calibrated: float, bare: float, base: float, value: float
) -> None:
    def row(**means: float) -> dict[str, Any]:
        return {score: {"planted": {"mean": mean}} for score, mean in means.items()}

    rows = {"released": row(calibrated=calibrated, loss=bare), "base": row(calibrated=0.0, loss=base)}
    assert most_exposed(rows) == pytest.approx(value, abs=1e-4)


def test_a_figure_that_keeps_the_limit_in_too_few_records_fails_with_the_number_that_would_do() -> None:
    rows = {"released": {"loss": plain_auc(0.55, 20)}, "base": {"loss": plain_auc(0.5, 20)}}
    told = line(measured(membership=rows), Limits(auc=0.65))
    assert (told["passed"], told["records"]) == (False, 20)
    assert told["value"] < told["limit"] < told["bound"]
    enough, few = (
        {row: {"loss": plain_auc(one["loss"]["auc"], n)} for row, one in rows.items()}
        for n in (told["needed"], told["needed"] - 20)
    )
    assert line(measured(membership=enough), Limits(auc=0.65))["passed"]
    assert not line(measured(membership=few), Limits(auc=0.65))["passed"]


def test_no_number_of_records_keeps_a_limit_that_the_figure_exceeds_or_meets() -> None:
    read = {"inversion": {"recall": 0.5, "tokens": 10}}
    for limit in (0.4, 0.5):
        told = line({"positions": {"public": {}, "server": read}}, Limits(recall=limit))
        assert (told["needed"], told["passed"]) == (None, False)


def test_by_the_estimate_a_figure_passes_alone_but_not_in_so_few_records_that_nothing_could() -> None:
    def by_estimate(records: int) -> dict[str, Any]:
        rows = {"released": {"loss": plain_auc(0.64, records)}, "base": {"loss": plain_auc(0.5, records)}}
        return line(measured(membership=rows), Limits(auc=0.65, on="estimate"))

    assert by_estimate(100)["passed"]
    assert by_estimate(100)["bound"] > 0.65
    assert not by_estimate(5)["passed"]
    assert by_estimate(5)["needed"] == 30  # Newcombe's interval of an AUC of 1/2 ends at .649 there


def test_nothing_extracted_from_few_records_says_little() -> None:
    few, many = (
        line(measured(extraction=memory([0.0] * n, [0.0] * n)), Limits(extraction=0.05)) for n in (16, 400)
    )
    assert (few["value"], few["passed"], many["passed"]) == (0.0, False, True)
    assert 100 < few["needed"] < 400


def test_a_limit_on_canaries_needs_canaries_before_anything_is_attacked() -> None:
    with pytest.raises(ConfigError, match=r"data\.canaries"):
        Limits(exposure=3.0).check(references=512, canaries=False)
    Limits(auc=0.65).check(references=512, canaries=False)


# --- the bound of a mean ----------------------------------------------------------------------------------


def test_the_bounds_of_a_mean_mirror_each_other_and_hold_it() -> None:
    values = np.random.default_rng(1).beta(2, 5, 40)
    low, high = bounded_mean(values.tolist(), low=0, high=1)
    turned = bounded_mean((1 - values).tolist(), low=0, high=1)
    assert low < values.mean() < high
    assert turned == pytest.approx((1 - high, 1 - low))
    assert bounded_mean((9 * values).tolist(), low=0, high=9) == pytest.approx((9 * low, 9 * high))


def test_the_bound_of_zeros_is_near_the_exact_one_of_a_proportion() -> None:
    assert bounded_mean([0.0] * 100, low=0, high=1)[1] == pytest.approx(
        proportion(0, 100).ci95[1], abs=0.015
    )  # .036


@pytest.mark.parametrize("values", [[], [1.5], [-0.5, 0.2]])
def test_values_beyond_their_limits_have_no_bound(values: list[float]) -> None:
    with pytest.raises(DataError, match="Expected values"):
        bounded_mean(values, low=0, high=1)


def test_the_bound_holds_where_values_come_in_order() -> None:
    assert bounded_mean([0.0] * 50 + [1.0] * 50, low=0, high=1)[1] > 0.5
    assert bounded_mean([1.0] * 50 + [0.0] * 50, low=0, high=1)[1] > 0.5
