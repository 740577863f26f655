"""Intervals and paired tests, by hand and against scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fedloom.statistics import estimate, is_constant, paired


def test_a_mean_of_three_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    # Standard deviation 1, so the error is 1 / sqrt(3); the 97.5% point of t with 2 degrees is 4.302653.
    half = 4.30265272991 / math.sqrt(3)
    assert found.mean == 2.0
    assert found.ci95 == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert found.values == (1.0, 2.0, 3.0)


def test_the_interval_is_scipys() -> None:
    values = [0.31, 0.42, 0.29, 0.55, 0.38]
    expected = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert estimate(values).ci95 == pytest.approx(expected, rel=1e-12)


def test_one_value_has_no_interval() -> None:
    assert estimate([0.5]) == estimate((0.5,))
    assert estimate([0.5]).ci95 is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert estimate([0.5, 0.5, 0.5]).ci95 == (0.5, 0.5)


def test_a_paired_difference_by_hand() -> None:
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = sqrt 12; with 2 degrees p = 1 - t / sqrt(t^2 + 2).
    assert found.estimate.mean == 2.0
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)


def test_pairing_removes_what_both_rows_share() -> None:
    shared = [0.0, 10.0, 20.0, 30.0]
    a = [s + d for s, d in zip(shared, (1.0, 1.1, 0.9, 1.0), strict=True)]
    found = paired(a, shared)
    assert found.p_value is not None
    assert found.p_value < 0.001 < float(stats.ttest_ind(a, shared).pvalue)


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [0.0]), ([1.0, 2.0], [0.0, 1.0])], ids=["one seed", "no spread"]
)
def test_where_a_test_is_undefined_there_is_no_p_value(a: list[float], b: list[float]) -> None:
    assert paired(a, b).p_value is None
    assert paired(a, b).estimate.mean == 1.0


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7 / 3])
def test_a_difference_that_is_constant_but_for_rounding_has_no_p_value_and_says_so(scale: float) -> None:
    b = [scale * x for x in (0.1, 0.2, 0.3, 0.7)]
    a = [x + 0.3 * scale for x in b]  # a - b is not bit by bit the same
    assert len({x - y for x, y in zip(a, b, strict=True)}) > 1
    found = paired(a, b)
    assert (found.p_value, found.constant) == (None, True)  # scipy's t test says 1e-47 or so
    assert found.estimate.mean == pytest.approx(0.3 * scale, rel=1e-12)
    assert found.estimate.ci95 == (found.estimate.mean, found.estimate.mean)


def test_rows_that_are_equal_but_for_rounding_do_not_differ() -> None:
    a = [0.1 + 0.2, 0.3 + 0.6, 1.1 + 2.2]
    b = [0.3, 0.9, 3.3]
    assert a != b
    found = paired(a, b)
    assert (found.estimate.mean, found.estimate.ci95, found.constant) == (0.0, (0.0, 0.0), True)


def test_a_small_spread_above_rounding_is_a_spread() -> None:
    found = paired([1.0, 1.0 + 1e-12, 1.0 + 2e-12], [0.0, 0.0, 0.0])
    assert not found.constant
    assert found.p_value is not None


def test_constant_and_single_values_are_told_apart() -> None:
    assert estimate([0.1 + 0.2, 0.3, 0.3]).constant
    assert not estimate([0.3]).constant
    assert not is_constant([0.3, math.inf])
    assert not paired([1.0], [0.0]).constant


def test_rows_of_different_seeds_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
