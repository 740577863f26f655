"""Randomness is a pure function of a seed and a name."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom import rng

words = st.one_of(st.text(max_size=3), st.text("\x1f:strint1", max_size=12), st.just("\ud800"))
names = st.lists(st.one_of(st.integers(-5, 5), words), max_size=4).map(tuple)


@given(st.integers(0, 3), names, st.integers(0, 3), names)
@settings(max_examples=200, deadline=None)
def test_keys_are_equal_exactly_when_seed_and_name_are(s: int, x: tuple, t: int, y: tuple) -> None:
    assert (rng.key(s, *x) == rng.key(t, *y)) == ((s, x) == (t, y))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (("a", "bc"), ("ab", "c")),
        ((1,), ("1",)),
        ((1, 23), (12, 3)),
        (("a",), ("a", "")),
        (("a\x1fstr:b",), ("a", "b")),
        (("a\x1f", "b"), ("a", "\x1fb")),
    ],
)
def test_parts_of_a_name_do_not_run_together(x: tuple, y: tuple) -> None:
    assert rng.key(0, *x) != rng.key(0, *y)


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    def draw(client: str) -> list[float]:
        return rng.numpy_stream(0, "order", client).random(4).tolist()

    alone = {client: draw(client) for client in "abc"}
    for order in itertools.permutations("abc"):
        assert {client: draw(client) for client in order} == alone


def test_streams_leave_the_global_generators_alone() -> None:
    before = torch.random.get_rng_state()
    rng.numpy_stream(0, "x").random(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_keys_are_the_same_in_every_release() -> None:
    # A run started with one version must go on with the next.
    assert rng.key(0, "order", "client-1", 3) == 5620878050133961595


def test_names_whose_keys_share_their_low_32_bits_have_streams_of_their_own() -> None:
    one, other = (("order", f"client-{i}", "local", 0) for i in (29714, 35593))
    assert rng.key(0, *one) % 2**32 == rng.key(0, *other) % 2**32  # all that seeds a torch generator
    assert (
        rng.numpy_stream(0, *one).permutation(50).tolist()
        != rng.numpy_stream(0, *other).permutation(50).tolist()
    )


def test_numpy_streams_are_named_the_same_way() -> None:
    assert rng.numpy_stream(0, "a").random() == rng.numpy_stream(0, "a").random()
    assert rng.numpy_stream(0, "a").random() != rng.numpy_stream(0, "b").random()
