"""Messages survive the wire; anything else is refused, never believed."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedloom.errors import RefusedUpdate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from tests.fakes import state

UPDATE = Update(
    "client-1", {"delta": state(1.0, 2.0), "control": state(3.0, 4.0)}, 7, {"loss": 0.5, "steps": 3}
)
HEADER = {"schema": 1, "kind": "update", "client": "c", "weight": 1.0, "metrics": {}, "states": ["delta"]}
TENSORS = {"delta/w": torch.ones(2)}


def packed(tensors: dict[str, torch.Tensor] = TENSORS, **changes: Any) -> bytes:
    return save(tensors, {"fedloom": json.dumps({**HEADER, **changes})})


def test_an_update_survives_to_the_bit() -> None:
    back = wire.unpack_update(wire.pack_update(UPDATE))
    assert (back.client, back.weight, back.metrics) == ("client-1", 7, {"loss": 0.5, "steps": 3})
    assert {k: v.sha256() for k, v in back.states.items()} == {
        k: v.sha256() for k, v in UPDATE.states.items()
    }


def test_a_broadcast_survives_to_the_bit() -> None:
    back = wire.unpack_broadcast(wire.pack_broadcast(Broadcast(4, {"adapter": state(1.0)}, "evaluate")))
    assert (back.round, back.task) == (4, "evaluate")
    assert back.adapter.sha256() == state(1.0).sha256()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_travels(dtype: torch.dtype) -> None:
    sent = AdapterState({"w": torch.tensor([1.5, -0.0, math.pi], dtype=dtype)})
    back = wire.unpack_update(wire.pack_update(Update("c", {"delta": sent}, 1)))
    assert back.delta.sha256() == sent.sha256()


def test_an_update_without_tensors_travels() -> None:
    back = wire.unpack_update(wire.pack_update(Update("c", {}, 3)))
    assert (dict(back.states), back.weight) == ({}, 3)


def test_a_loss_that_is_not_a_number_travels() -> None:
    back = wire.unpack_update(wire.pack_update(Update("c", {}, 1, {"loss": math.nan})))
    assert math.isnan(back.metrics["loss"])


def test_names_may_hold_slashes() -> None:
    sent = AdapterState({"a/b": torch.ones(1)})
    assert list(wire.unpack_update(wire.pack_update(Update("o/p", {"delta": sent}, 1))).delta) == ["a/b"]


def test_what_is_accepted_is_what_the_fields_say() -> None:
    assert wire.unpack_update(packed()).delta["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"client": None},
        {"client": 3},
        {"weight": "7"},
        {"weight": None},
        {"weight": True},
        {"metrics": [1]},
        {"metrics": {"loss": "low"}},
        {"states": None},
        {"states": [["delta"]]},
        {"states": []},
        {"states": "delta"},
    ],
    ids=str,
)
def test_fields_of_another_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(packed(**changes))
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    "header", ["[1]", "3", "null", "[" * 20_000, '{"schema": 1}', ""], ids=lambda h: h[:8]
)
def test_strange_headers_are_refused(header: str) -> None:
    with pytest.raises(RefusedUpdate):
        wire.unpack_update(save(TENSORS, {"fedloom": header}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2) + b"[]",
        save(TENSORS),
        b"PK\x03\x04",
    ],
    ids=["empty", "zeros", "ones", "huge", "list", "no metadata", "zip"],
)
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(data)
    assert refused.value.code == "malformed"


@pytest.mark.parametrize("changes", [{"schema": 2}, {"kind": "broadcast"}, {"schema": None}], ids=str)
def test_another_schema_or_kind_is_said_to_be_that(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(packed(**changes))
    assert refused.value.code == "schema"


def test_a_broadcast_is_not_an_update() -> None:
    with pytest.raises(RefusedUpdate, match="expected a update of schema 1, got 'broadcast'"):
        wire.unpack_update(wire.pack_broadcast(Broadcast(0, {"adapter": state(1.0)})))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedUpdate):
        wire.unpack_update(data)


def test_damaged_updates_are_refused_or_are_updates() -> None:
    data, chance = wire.pack_update(UPDATE), random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        cut = bytes(damaged[: chance.randrange(len(data))]) if chance.random() < 0.3 else bytes(damaged)
        try:
            assert isinstance(wire.unpack_update(cut), Update)
        except RefusedUpdate:
            refused += 1
    assert refused > 1000  # the rest hit a value or a letter of a name
