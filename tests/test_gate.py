"""The gate names why an update cannot be used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedloom.errors import ConfigError, RefusedUpdate
from fedloom.gate import Admitted, Gate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.transport.base import Arrival
from tests.fakes import A, B, arrival, state

SENT = {"c": Broadcast(3, {"adapter": state(1.0, 2.0)})}
EXPECTED = {"delta": state(0.0, 0.0)}
REPORTS = {"loss", "steps"}


def admit(
    arrived: Arrival,
    gate: Gate = Gate(),
    *,
    answered: tuple[str, ...] = (),
    expected: Mapping[str, AdapterState] = EXPECTED,
) -> Admitted:
    return gate.admit(arrived, SENT, expected, REPORTS, answered)


def code_of(arrived: Arrival, gate: Gate = Gate(), *, answered: tuple[str, ...] = ()) -> str:
    with pytest.raises(RefusedUpdate) as refused:
        admit(arrived, gate, answered=answered)
    return refused.value.code


def honest(**changes: object) -> Update:
    update = Update("c", {"delta": state(3.0, 4.0)}, 1, {"loss": 0.5}, round=3)
    return replace(update, **changes)  # type: ignore[arg-type]


def delta(**changes: torch.Tensor) -> Update:
    tensors = {**state(0.5, 0.5), **{{"a": A, "b": B}.get(k, k): v for k, v in changes.items()}}
    return honest(states={"delta": AdapterState(tensors)})


def test_an_answer_to_the_broadcast_passes_unchanged_with_its_norm() -> None:
    update = honest()
    passed = admit(arrival(update), answered=("another",))
    assert passed.update is update
    assert passed.norms == {"delta": 5.0}  # (3, 4)


def test_an_update_that_shares_nothing_passes_where_nothing_is_expected() -> None:
    update = honest(states={})
    assert admit(arrival(update), expected={}).update is update


def test_an_update_without_states_is_refused_where_some_are_expected() -> None:
    assert code_of(arrival(honest(states={}))) == "states"


def test_a_state_nobody_expects_is_refused() -> None:
    assert code_of(arrival(honest(states={"delta": state(0.5, 0.5), "more": state(0.5, 0.5)}))) == "states"


def test_a_second_answer_is_a_duplicate() -> None:
    assert code_of(arrival(honest()), answered=("c",)) == "duplicate"


def test_whoever_was_not_asked_is_unknown() -> None:
    assert code_of(arrival(honest(client="mallory"))) == "unknown"


def test_a_client_speaks_for_itself_alone() -> None:
    assert code_of(arrival(honest(client="b"), "c")) == "sender"


@pytest.mark.parametrize("round", [2, 4, -1])
def test_an_answer_to_another_round_is_refused(round: int) -> None:
    assert code_of(arrival(honest(round=round))) == "round"


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf, 1e9, 10**400])
def test_a_weight_that_is_no_count_is_refused(weight: float) -> None:
    assert code_of(arrival(honest(weight=weight))) == "weight"


def test_a_weight_of_zero_passes_and_its_norm_is_compared_with_nobodys() -> None:
    passed = admit(arrival(honest(weight=0)))
    Gate().proportionate(passed, {"delta": [1e-9]})


def test_nothing_is_opened_before_sender_and_size_are_judged() -> None:
    def explode() -> Update:
        raise AssertionError("opened")

    for sender, size in (("mallory", 10), ("c", 10**9)):
        assert code_of(Arrival(sender, size, 0, explode)) in ("unknown", "size")


def test_an_answer_may_take_what_its_tensors_take_and_a_little() -> None:
    most = 4 * 4 + 1 + 2 * 512 + 4 * (len(A) + len(B)) + 65_536  # 4 values, a tenth, names, the rest
    assert admit(arrival(honest(), up=most))
    assert code_of(arrival(honest(), up=most + 1)) == "size"


def test_a_limit_in_bytes_can_be_set() -> None:
    assert code_of(arrival(honest(), up=1001), Gate(max_bytes=1000)) == "size"


def test_an_extra_tensor_is_refused() -> None:
    assert code_of(arrival(delta(extra=torch.zeros(1)))) == "keys"


def test_a_missing_tensor_is_refused() -> None:
    assert code_of(arrival(honest(states={"delta": AdapterState({A: torch.ones(1, 2)})}))) == "keys"


def test_another_shape_is_refused() -> None:
    assert code_of(arrival(delta(a=torch.ones(2, 2)))) == "shape"


def test_another_precision_is_refused() -> None:
    assert code_of(arrival(delta(a=torch.ones(1, 2, dtype=torch.float64)))) == "dtype"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_refused(bad: float) -> None:
    assert code_of(arrival(delta(b=torch.tensor([[0.0], [bad]])))) == "non-finite"


def test_every_state_is_looked_at() -> None:
    states = {"delta": state(0.5, 0.5), "control": state(0.5, math.nan)}
    with pytest.raises(RefusedUpdate, match="control"):
        admit(arrival(honest(states=states)), expected={**EXPECTED, "control": state(0.0, 0.0)})


def test_a_flood_of_subnormal_numbers_is_refused_and_a_few_are_not() -> None:
    assert code_of(arrival(honest(states={"delta": AdapterState({A: torch.full((1, 2), 1e-40), B: torch.full((2, 1), 1e-41)})}))) == "subnormal"  # fmt: skip
    assert admit(arrival(delta(a=torch.tensor([[1e-40, 0.5]]))))


@pytest.mark.parametrize("huge", [1e30, 3e38, 1001.0])
def test_a_norm_beyond_the_bound_is_refused(huge: float) -> None:
    assert code_of(arrival(delta(a=torch.tensor([[huge, 0.0]])))) == "norm"


def test_a_norm_out_of_proportion_to_the_cohort_is_refused() -> None:
    gate, cohort = Gate(max_norm_ratio=4.0), {"delta": [1.0, 1.0, 1.5]}
    gate.proportionate(Admitted(honest(), {"delta": 4.0}), cohort)
    with pytest.raises(RefusedUpdate, match=r"norm 4\.1 is more than 4 times the median"):
        gate.proportionate(Admitted(honest(), {"delta": 4.1}), cohort)


@pytest.mark.parametrize(
    "metrics",
    [{"loss": 1e300}, {"loss": -1e300}, {"loss": 10**400}, {"secret": 1.0}],
    ids=str,
)
def test_metrics_are_numbers_of_a_known_name(metrics: dict[str, float]) -> None:
    assert code_of(arrival(honest(metrics=metrics))) == "metrics"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_training_that_diverged_is_called_non_finite_by_its_state_or_its_loss(
    loss: float, value: float
) -> None:
    """A client that sends no state, as when everybody trains alone, says so by its loss."""
    lost = honest(states={"delta": state(value, 0.0)}, metrics={"loss": loss})
    assert code_of(arrival(lost)) == "non-finite"


def test_the_reason_names_numbers_and_tensors() -> None:
    with pytest.raises(RefusedUpdate, match=r"delta/base_model.*lora_A.*expected \(1, 2\), got \(2, 2\)"):
        admit(arrival(delta(a=torch.ones(2, 2))))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_norm": 0.0},
        {"max_norm": math.nan},
        {"max_weight": math.inf},
        {"max_norm_ratio": 1.0},
        {"max_bytes": 0},
    ],
    ids=str,
)
def test_limits_that_limit_nothing_or_everything_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"gate.{next(iter(limits))}"):
        Gate(**limits)  # type: ignore[arg-type]
