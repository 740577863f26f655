"""The weighted mean, with its arithmetic."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.algorithms.aggregators import weighted_mean
from fedloom.errors import EmptyCohort, ShapeMismatch
from fedloom.messages import Update
from fedloom.state import AdapterState
from tests.fakes import A, numbers, state


def update(client: str, weight: float, *values: float) -> Update:
    return Update(client, {"delta": state(*values)}, weight)


def mean(*updates: Update) -> AdapterState:
    return weighted_mean(updates, state(0.0))["delta"]


def test_weights_are_numbers_of_examples() -> None:
    assert numbers(mean(update("a", 3, 1.0), update("b", 1, 5.0))) == [2.0]  # (3*1 + 1*5) / 4


def test_only_the_ratio_of_weights_counts() -> None:
    small, large = (
        mean(update("a", 3, 1.0), update("b", 1, 5.0)),
        mean(update("a", 300, 1.0), update("b", 100, 5.0)),
    )
    assert small.sha256() == large.sha256()


def test_equal_updates_have_themselves_as_mean() -> None:
    # The shares sum to one: whatever the weights, a value that all agree on is kept to the bit.
    assert (
        mean(*(update(c, w, math.pi) for c, w in zip("abc", (1, 7, 13), strict=True))).sha256()
        == state(math.pi).sha256()
    )


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 10_000)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_mean_lies_between_the_extremes(entries: list[tuple[float, int]]) -> None:
    [found] = numbers(mean(*(update(f"c{i}", n, x) for i, (x, n) in enumerate(entries))))
    values = [x for x, _ in entries]
    assert min(values) <= found <= max(values)


def test_updates_are_folded_as_they_come_and_none_is_kept() -> None:
    gone: list[weakref.ref[AdapterState]] = []

    def arriving() -> Iterator[Update]:
        for i in range(20):
            one = update(f"client-{i}", 1, float(i))
            if i:  # the first is kept for its precision
                gone.append(weakref.ref(one.states["delta"]))
            yield one
            assert sum(ref() is not None for ref in gone) <= 1  # the one just folded

    assert numbers(weighted_mean(arriving(), state(0.0))["delta"]) == [9.5]  # (0 + ... + 19) / 20


def test_the_sum_is_taken_in_float64() -> None:
    # In float32, 2**24 + 1 is 2**24: the two small updates would vanish.
    assert numbers(
        mean(update("a", 1, 2.0**24), update("b", 1, 1.0), update("c", 1, 1.0), update("d", 1, 2.0))
    ) == [(2**24 + 4) / 4]


def test_the_precision_of_the_updates_is_kept() -> None:
    found = weighted_mean([Update("a", {"delta": state(1.0, dtype=torch.bfloat16)}, 1)], state(0.0))["delta"]
    assert found[A].dtype == torch.bfloat16


def test_every_named_state_is_averaged() -> None:
    one = Update("a", {"delta": state(1.0), "control": state(10.0)}, 1)
    two = Update("b", {"delta": state(3.0), "control": state(30.0)}, 1)
    means = weighted_mean([one, two], state(0.0))
    assert {name: numbers(s) for name, s in means.items()} == {"delta": [2.0], "control": [20.0]}


def test_a_client_of_weight_zero_says_nothing() -> None:
    assert numbers(mean(update("a", 0, 100.0), update("b", 2, 1.0))) == [1.0]


@pytest.mark.parametrize("updates", [[], [update("a", 0, 1.0)]], ids=["nobody", "weight zero"])
def test_nobody_to_average_is_an_empty_cohort(updates: list[Update]) -> None:
    with pytest.raises(EmptyCohort, match="positive weight"):
        mean(*updates)


def test_updates_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        mean(update("a", 1, 1.0), update("b", 1, 1.0, 2.0))


def test_averaging_factors_misses_the_mean_product_by_the_covariance() -> None:
    """sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A), where B and A are the means of the factors."""
    torch.manual_seed(0)
    a = torch.randn(3, 2, 5, dtype=torch.float64)  # (K, r, d_in)
    b = torch.randn(3, 4, 2, dtype=torch.float64)  # (K, d_out, r)
    n = torch.tensor([5, 1, 14])
    p = (n.double() / n.sum())[:, None, None]  # shares
    updates = [
        Update(f"c{k}", {"delta": AdapterState({"A": a[k], "B": b[k]})}, float(n[k])) for k in range(3)
    ]
    factors = weighted_mean(updates, AdapterState({}))["delta"]
    products = weighted_mean(
        [Update(f"c{k}", {"delta": AdapterState({"W": b[k] @ a[k]})}, float(n[k])) for k in range(3)],
        AdapterState({}),
    )["delta"]["W"]
    covariance = (p * ((b - factors["B"]) @ (a - factors["A"]))).sum(0)
    assert torch.allclose(products - factors["B"] @ factors["A"], covariance, rtol=0, atol=1e-13)
    assert covariance.abs().max() > 0.1  # it is no small print
