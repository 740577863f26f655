"""The gate names why an update cannot be used."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.errors import RefusedUpdate
from fedloom.gate import admit
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from tests.fakes import A, B, state

SENT = Broadcast(3, {"adapter": state(1.0, 2.0)})


def code_of(update: Update, admitted: tuple[str, ...] = ()) -> str:
    with pytest.raises(RefusedUpdate) as refused:
        admit(update, SENT, admitted)
    return refused.value.code


def delta(**changes: torch.Tensor) -> Update:
    tensors = {**state(0.5, 0.5), **{{"a": A, "b": B}.get(k, k): v for k, v in changes.items()}}
    return Update("c", {"delta": AdapterState(tensors)}, 1)


def test_an_answer_to_the_broadcast_passes_unchanged() -> None:
    update = delta()
    assert admit(update, SENT, ["another"]) is update


def test_an_update_that_shares_nothing_passes() -> None:
    update = Update("c", {}, 1)
    assert admit(update, SENT) is update


def test_a_second_answer_is_a_duplicate() -> None:
    assert code_of(delta(), ("c",)) == "duplicate"


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_count_is_refused(weight: float) -> None:
    assert code_of(Update("c", {"delta": state(0.5, 0.5)}, weight)) == "weight"


def test_an_extra_tensor_is_refused() -> None:
    assert code_of(delta(extra=torch.zeros(1))) == "keys"


def test_a_missing_tensor_is_refused() -> None:
    assert code_of(Update("c", {"delta": AdapterState({A: torch.ones(1, 2)})}, 1)) == "keys"


def test_another_shape_is_refused() -> None:
    assert code_of(delta(a=torch.ones(2, 2))) == "shape"


def test_another_precision_is_refused() -> None:
    assert code_of(delta(a=torch.ones(1, 2, dtype=torch.float64))) == "dtype"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_refused(bad: float) -> None:
    assert code_of(delta(b=torch.tensor([[0.0], [bad]]))) == "non-finite"


def test_every_state_is_looked_at() -> None:
    assert (
        code_of(Update("c", {"delta": state(0.5, 0.5), "control": state(0.5, math.nan)}, 1)) == "non-finite"
    )


def test_the_reason_names_numbers_and_tensors() -> None:
    with pytest.raises(RefusedUpdate, match=r"delta/base_model.*lora_A.*expected \(1, 2\), got \(2, 2\)"):
        admit(delta(a=torch.ones(2, 2)), SENT)
