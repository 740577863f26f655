"""What an engine is asked and what it answers, as bytes and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedloom.engine import letters
from fedloom.state import AdapterState
from fedloom.steps import (
    Correction,
    Fit,
    Fitted,
    Frozen,
    Generate,
    LocalTraining,
    Privacy,
    Score,
    Scored,
    Tokens,
    TokenScores,
)

ADAPTER = AdapterState({"q.lora_A": torch.arange(6.0).reshape(2, 3), "q.lora_B": torch.zeros(3, 2)})
ADAMW = LocalTraining(epochs=2, learning_rate=1 / 3)
SHORT, LONG = Tokens((1, 2), (False, True)), Tokens((3, 4, 5), (False, False, True))


def there_and_back(value: Any) -> Any:
    return letters.unpack(letters.pack(value))


def same(left: Any, right: Any) -> bool:
    """Equality of dataclasses, whose adapters compare by their bytes."""
    if isinstance(left, AdapterState):
        return isinstance(right, AdapterState) and left.sha256() == right.sha256()
    if isinstance(left, list | tuple):
        return type(left) is type(right) and all(map(same, left, right)) and len(left) == len(right)
    if hasattr(left, "__dataclass_fields__"):
        return type(left) is type(right) and same(list(vars(left).values()), list(vars(right).values()))
    return bool(left == right)


@pytest.mark.parametrize(
    "value",
    [
        Fit(
            ADAPTER, [SHORT, LONG], ADAMW, 7, ("client-1", "local", 3), seen=7, limit=5, weights=[0.5, 1 / 3]
        ),
        Fit(
            ADAPTER,
            (SHORT,),
            LocalTraining(optimizer="sgd", momentum=0.9),
            correction=Correction(ADAPTER, ADAPTER, 0.1),
            train="B",
            frozen=Frozen(ADAPTER, 0.5),
            privacy=Privacy(1.0, 0.7),
            scale=2.0,
        ),
        Generate([[1, 2], (3,)], None, stop=frozenset({2, 0}), temperature=0.7, stream=("a", 1), top_k=40),
        Score([LONG], None, energy=True, per_token=True),
        Fitted(ADAPTER, 3, 40, 500, 3e-4, 1.25),
        [Scored(0.1, 2), Scored(1e-300, 1, 2.5, TokenScores((0.1,), (0.2,), (0.3,)))],
        [[1, 2], []],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_read_is_what_was_written(value: Any) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_adapter_keeps_its_dtype_and_its_bits(dtype: torch.dtype) -> None:
    assert there_and_back(ADAPTER.to(dtype) / 3.0).sha256() == (ADAPTER.to(dtype) / 3.0).sha256()


def test_a_loss_that_is_no_number_stays_none() -> None:
    assert math.isnan(there_and_back(Fitted(ADAPTER, 0, 0, 0, 0.0, math.nan)).loss)


def test_requests_that_share_an_adapter_share_it_again() -> None:
    first, second = there_and_back([Score([SHORT], ADAPTER), Score([SHORT], ADAPTER)])
    assert first.adapter is second.adapter
    assert first.examples[0] is second.examples[0]


def test_equal_adapters_that_are_two_objects_stay_two() -> None:
    first, second = there_and_back([Score([], ADAPTER), Score([], ADAPTER.to(torch.float32))])
    assert first.adapter is not second.adapter


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="got a object"):
        letters.pack({"a": object()})
