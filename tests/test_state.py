"""AdapterState behaves like one immutable vector."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import ShapeMismatch
from fedloom.state import AdapterState

# Small integers in float64: sums and products are exact, so that laws hold to the bit.
entries = st.integers(-1000, 1000).map(float)
pairs = st.lists(entries, min_size=6, max_size=6)


def make(values: list[float], dtype: torch.dtype = torch.float64) -> AdapterState:
    x = torch.tensor(values, dtype=dtype)
    return AdapterState({"b": x[:2], "a": x[2:].reshape(2, 2)})


def same(x: AdapterState, y: AdapterState) -> bool:
    return x.sha256() == y.sha256()


@given(pairs, pairs, pairs)
@settings(max_examples=50, deadline=None)
def test_addition_is_that_of_a_vector(x: list[float], y: list[float], z: list[float]) -> None:
    a, b, c = make(x), make(y), make(z)
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))
    assert same(a + a.zeros_like(), a + 0.0)
    assert same((a + b) - b, a + 0.0)


@given(pairs, pairs, st.integers(-50, 50), st.integers(-50, 50))
@settings(max_examples=50, deadline=None)
def test_scaling_distributes(x: list[float], y: list[float], s: int, t: int) -> None:
    a, b = make(x), make(y)
    assert same(s * (a + b) + 0.0, s * a + s * b + 0.0)
    assert same(s * (t * a) + 0.0, (s * t) * a + 0.0)
    assert same(a * s, s * a)


@given(pairs)
@settings(max_examples=30, deadline=None)
def test_the_norm_is_that_of_one_flat_vector(x: list[float]) -> None:
    assert make(x).norm() == pytest.approx(math.sqrt(sum(v * v for v in x)), rel=1e-12)


def test_the_norm_of_float32_is_summed_in_float64() -> None:
    many = AdapterState({"w": torch.full((2**24 + 2**22,), 1.0)})  # float32 would stop counting at 2**24
    assert many.norm() ** 2 == pytest.approx(2**24 + 2**22, rel=1e-12)


def test_division_and_square_root_are_elementwise() -> None:
    x = AdapterState({"w": torch.tensor([4.0, 16.0])})
    assert (x / 4).sqrt()["w"].tolist() == [1.0, 2.0]
    assert (x / x)["w"].tolist() == [1.0, 1.0]


def test_names_are_kept_in_order_whatever_order_they_come_in() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert list(AdapterState({"b": one, "a": two})) == ["a", "b"]
    assert same(AdapterState({"b": one, "a": two}), AdapterState({"a": two, "b": one}))


def test_arithmetic_leaves_its_operands_alone() -> None:
    a, b = make([1, 2, 3, 4, 5, 6]), make([6, 5, 4, 3, 2, 1])
    before = a.sha256(), b.sha256()
    _ = (a + b, a - b, 2.0 * a, a / b, a.sqrt(), a.to(torch.float32), a.zeros_like())
    assert (a.sha256(), b.sha256()) == before


def test_there_is_no_way_to_assign_a_tensor() -> None:
    with pytest.raises(TypeError, match="item assignment"):
        make([0.0] * 6)["a"] = torch.zeros(2, 2)  # type: ignore[index]


def test_the_mapping_it_was_made_from_may_change() -> None:
    tensors = {"w": torch.ones(2)}
    made = AdapterState(tensors)
    tensors["w"] = torch.zeros(2)
    tensors["v"] = torch.zeros(2)
    assert list(made) == ["w"]
    assert made["w"].tolist() == [1.0, 1.0]


def test_no_gradient_comes_along() -> None:
    assert not AdapterState({"w": torch.ones(2, requires_grad=True)})["w"].requires_grad


@pytest.mark.parametrize("operation", ["__add__", "__sub__", "__mul__", "__truediv__"])
def test_other_names_are_refused_and_the_first_odd_one_is_named(operation: str) -> None:
    with pytest.raises(ShapeMismatch, match=r"differ in 2 tensors, first: 'p'"):
        getattr(AdapterState({"p": torch.ones(2)}), operation)(AdapterState({"q": torch.ones(2)}))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"'w': \(2,\) vs \(1,\)"):
        AdapterState({"w": torch.ones(2)}) + AdapterState({"w": torch.ones(1)})


@pytest.mark.parametrize(
    "other",
    [
        AdapterState({"w": torch.tensor([1.0, -0.0])}),  # another bit pattern of the same value
        AdapterState({"v": torch.tensor([1.0, 0.0])}),
        AdapterState({"w": torch.tensor([[1.0, 0.0]])}),
        AdapterState({"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}),
    ],
    ids=["sign of zero", "name", "shape", "dtype"],
)
def test_the_hash_tells_apart_what_differs(other: AdapterState) -> None:
    assert AdapterState({"w": torch.tensor([1.0, 0.0])}).sha256() != other.sha256()


def test_the_hash_does_not_depend_on_memory_layout() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert same(AdapterState({"w": x.t()}), AdapterState({"w": x.t().contiguous()}))


def test_one_bad_value_is_noticed() -> None:
    assert make([0.0] * 6).is_finite()
    assert not make([0.0] * 5 + [math.nan]).is_finite()
    assert not make([0.0] * 5 + [math.inf]).is_finite()


def test_equality_is_identity_since_tensors_have_no_truth() -> None:
    a = make([0.0] * 6)
    assert a == a
    assert a != make([0.0] * 6)
    assert {a: 1}[a] == 1
