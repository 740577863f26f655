"""PEFT's key grammar, and products of factors against dense matrices."""

from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.errors import ShapeMismatch
from fedloom.state import AdapterState


def adapter(rank: int, *, seed: int = 0, targets: tuple[str, ...] = ("q", "v")) -> AdapterState:
    """Of targets with 7 inputs and 9 outputs."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in targets:
        tensors[lora.key(lora.ON_DISK + target, "A")] = torch.randn(rank, 7, generator=chance).double()
        tensors[lora.key(lora.ON_DISK + target, "B")] = torch.randn(9, rank, generator=chance).double()
    return AdapterState(tensors)


def dense(state: AdapterState) -> dict[str, torch.Tensor]:
    return {target: b @ a for target, (a, b) in lora.pairs(state).items()}


def test_a_key_is_the_one_peft_writes():
    assert lora.key(lora.ON_DISK + "layers.0.q_proj", "B") == "base_model.model.layers.0.q_proj.lora_B.weight"


def test_parsing_a_key_gives_back_its_parts():
    assert lora.parse(lora.key("m", "A")) == ("m", "A")
    assert lora.parse("m.lora_magnitude_vector.weight") is None


def test_a_state_is_its_pairs():
    state = adapter(3)
    assert lora.state_of(lora.pairs(state)).sha256() == state.sha256()


@pytest.mark.parametrize("odd", ["m.lora_A.weight", "m.lora_magnitude_vector.weight"])
def test_what_is_no_pair_is_refused_by_name(odd):
    with pytest.raises(ShapeMismatch, match=r"m\.lora_"):
        lora.pairs({**adapter(3), odd: torch.ones(2, 2)})


def test_factors_of_two_ranks_are_no_pair():
    state = {**lora.only(adapter(3), "A"), **lora.only(adapter(2), "B")}
    with pytest.raises(ShapeMismatch, match=r"\(3, 7\) and \(9, 2\)"):
        lora.pairs(state)


def test_two_halves_make_the_whole():
    state = adapter(3)
    a, b = lora.only(state, "A"), lora.only(state, "B")
    assert not a.keys() & b.keys()
    assert AdapterState({**a, **b}).sha256() == state.sha256()


def test_a_stack_is_the_weighted_sum_of_products_of_any_ranks_and_targets():
    one, other = adapter(2, seed=1), adapter(5, seed=2, targets=("v", "o"))
    ours, x, y = dense(lora.stack([(0.25, one), (3.0, other)])), dense(one), dense(other)
    expected = {"q": 0.25 * x["base_model.model.q"], "o": 3 * y["base_model.model.o"]}
    expected["v"] = 0.25 * x["base_model.model.v"] + 3 * y["base_model.model.v"]
    assert ours.keys() == {lora.ON_DISK + name for name in expected}
    for name, product in expected.items():
        assert torch.allclose(ours[lora.ON_DISK + name], product, rtol=0, atol=1e-12)


def test_a_stack_of_other_shapes_names_the_target():
    other = AdapterState({name: t[:, :2] if "lora_A" in name else t for name, t in adapter(2).items()})
    with pytest.raises(ShapeMismatch, match=r"'base_model.model.q'.*\(9, 2\), \(9, 7\)"):
        lora.stack([(1.0, adapter(2)), (1.0, other)])


def test_truncation_is_the_best_of_its_rank():
    whole = adapter(6)
    ours = dense(lora.truncate(whole, 2))
    for target, full in dense(whole).items():
        u, s, v = torch.linalg.svd(full)
        assert torch.allclose(ours[target], (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("out", "r", "into", "rank"), [(1, 6, 7, 4), (9, 6, 3, 4), (9, 2, 7, 4), (9, 6, 7, 6)]
)
def test_a_rank_with_room_loses_nothing(out: int, r: int, into: int, rank: int) -> None:
    pair = lora.Pair(torch.randn(r, into).double(), torch.randn(out, r).double())
    new_a, new_b = lora.pairs(lora.truncate(lora.state_of({"m": pair}), rank))["m"]
    assert (new_b.shape, new_a.shape) == ((out, rank), (rank, into))
    assert torch.allclose(new_b @ new_a, pair.b @ pair.a, atol=1e-12)


def test_the_norm_of_products_needs_no_product():
    state = adapter(3)
    expected = sum(float(product.square().sum()) for product in dense(state).values()) ** 0.5
    assert lora.product_norm(state) == pytest.approx(expected, rel=1e-12)
