"""Messages survive the wire; anything else is refused, never believed."""

from __future__ import annotations

import json
import math
import re
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
from fedloom.transport.codec import Fp32
from tests.fakes import A, state

UPDATE = Update(
    "client-1", {"delta": state(1.0, 2.0), "control": state(3.0, 4.0)}, 7, {"loss": 0.5, "steps": 3}, 5
)
HEADER = {
    "schema": 2,
    "kind": "update",
    "client": "c",
    "round": 0,
    "weight": 1.0,
    "metrics": {},
    "states": ["delta"],
}
TENSORS = {"delta/w": torch.ones(2)}


def packed(tensors: dict[str, torch.Tensor] = TENSORS, **changes: Any) -> bytes:
    return wire.seal(save(tensors, {"fedloom": json.dumps({**HEADER, **changes})}))


def test_an_update_survives_to_the_bit() -> None:
    back = wire.unpack_update(wire.pack_update(UPDATE))
    assert back.metrics == {"loss": 0.5, "steps": 3}
    assert (back.client, back.weight, back.round) == ("client-1", 7, 5)
    assert {k: v.sha256() for k, v in back.states.items()} == {
        k: v.sha256() for k, v in UPDATE.states.items()
    }


def test_a_broadcast_survives_to_the_bit() -> None:
    back = wire.unpack_broadcast(wire.pack_broadcast(Broadcast(4, {"adapter": state(1.0)}, 3)))
    assert (back.round, back.acknowledged) == (4, 3)
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
        {"metrics": {"loss": True}},
        {"round": None},
        {"round": 0.5},
        {"round": True},
        {"states": ["delta", "delta"]},
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
        wire.unpack_update(wire.seal(save(TENSORS, {"fedloom": header})))


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


@pytest.mark.parametrize("changes", [{"schema": 1}, {"kind": "broadcast"}, {"schema": None}], ids=str)
def test_another_schema_or_kind_is_said_to_be_that(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(packed(**changes))
    assert refused.value.code == "schema"


def test_a_broadcast_is_not_an_update() -> None:
    with pytest.raises(RefusedUpdate, match="expected a fedloom update of schema 2, got another kind"):
        wire.unpack_update(wire.pack_broadcast(Broadcast(0, {"adapter": state(1.0)})))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedUpdate):
        wire.unpack_update(data)


def test_a_message_of_another_experiment_is_refused() -> None:
    for theirs in ("theirs", ""):
        with pytest.raises(RefusedUpdate) as refused:
            wire.unpack_update(wire.pack_update(UPDATE, experiment=theirs), experiment="ours")
        assert refused.value.code == "experiment"


def header(data: bytes) -> tuple[bytes, bytes]:
    body = data[wire.CHECKSUM :]
    length = int.from_bytes(body[:8], "little")
    return body[8 : 8 + length], body[8 + length :]


def with_header(text: bytes, rest: bytes) -> bytes:
    return wire.seal(struct.pack("<Q", len(text)) + text + rest)


def test_nothing_in_a_header_is_said_twice() -> None:
    """One reader would take the first of two, another the last."""
    said, rest = header(packed())
    [entry] = re.findall(rb'"delta/w":\{[^}]*\}', said)
    for twice in (
        said.replace(entry, entry + b"," + entry),
        said.replace(b'\\"client\\": \\"c\\"', b'\\"client\\": \\"b\\", \\"client\\": \\"c\\"'),
    ):
        assert len(twice) > len(said)
        with pytest.raises(RefusedUpdate, match="not one"):
            wire.unpack_update(with_header(twice, rest))


def test_a_header_larger_than_its_tensors_need_is_not_read() -> None:
    filler = json.dumps({"__metadata__": {"fedloom": json.dumps(HEADER), "more": "x" * 70_000}})
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(with_header(filler.encode(), b""))
    assert refused.value.code == "malformed"


def test_a_refusal_repeats_nothing_of_what_came() -> None:
    for data in (
        packed(client=3, kind="Aardvark"),
        packed(metrics={"Aardvark": "x"}),
        packed(codec="Aardvark"),
    ):
        with pytest.raises(RefusedUpdate) as refused:
            wire.unpack_update(data)
        assert "Aardvark" not in str(refused.value)


def test_a_step_of_another_adapter_is_refused() -> None:
    packed = wire.pack_broadcast(
        Broadcast(3, {"adapter": state(1.0)}), Fp32(), [state(0.5)], since=1, version=2
    )
    other = AdapterState({"another": state(1.0)[A]})
    with pytest.raises(RefusedUpdate, match="step 2 is of another adapter") as refused:
        wire.unpack_broadcast(packed, Fp32(), {1: other})
    assert refused.value.code == "malformed"
