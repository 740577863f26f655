"""What holds for every message and for every way to damage one, by hypothesis.

FEDLOOM_CASES=20000 python -m pytest tests/transport/test_properties.py     # five times as many; 200 of each by default
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom.errors import RefusedUpdate
from fedloom.gate import Gate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.base import Arrival
from fedloom.transport.codec import Bf16, Codec, Fp32, Int4, Int8

cases = settings(
    max_examples=int(os.environ.get("FEDLOOM_CASES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
CODECS: list[
    tuple[Codec, float]
] = [  # and how far off a value is at most, in parts of the largest of its tensor
    (Fp32(), 0.0),
    (Bf16(), 1 / 256),
    (Int8(block=4), 0.51 / 127),
    (Int8(block=4, zstd=False), 0.51 / 127),
    (Int4(block=4, levels=7), 0.51 / 7),
    (Int4(block=4, zstd=False, levels=3), 0.51 / 3),
]
REPORTS = {"loss", "steps"}

numbers = st.floats(-1e3, 1e3, width=32) | st.floats(width=32, allow_nan=False, allow_infinity=False)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def adapters(draw: Callable[..., Any]) -> AdapterState:
    found = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        shape = draw(shapes)
        count = int(np.prod(shape))
        values = draw(st.lists(numbers, min_size=count, max_size=count))
        found[name] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return AdapterState(found)


@st.composite
def updates(draw: Callable[..., Any]) -> Update:
    named = draw(st.lists(names.filter(lambda n: "/" not in n), max_size=2, unique=True))
    return Update(
        draw(names),
        {name: draw(adapters()) for name in named},
        draw(st.integers(0, 10**6) | st.floats(0, 1e6)),
        draw(st.dictionaries(st.sampled_from(sorted(REPORTS)), st.floats(-1e6, 1e6))),
        draw(st.integers(0, 99)),
    )


def outcome(data: bytes, codec: Codec, sent: Update) -> Update | str:
    """The update that the gate admits, or the code under which it was refused; anything else is a bug."""
    arrived = Arrival(sent.client, len(data), 0, lambda: wire.unpack_update(data, codec, sent.states))
    broadcasts = {sent.client: Broadcast(sent.round, {"adapter": AdapterState({})})}
    try:
        passed = Gate(max_norm=1e300, max_bytes=1 << 20).admit(arrived, broadcasts, sent.states, REPORTS, ())
    except RefusedUpdate as refused:
        return refused.code
    update = passed.update
    assert {n: [(k, t.shape, t.dtype) for k, t in s.items()] for n, s in update.states.items()} == {
        n: [(k, t.shape, t.dtype) for k, t in s.items()] for n, s in sent.states.items()
    }
    assert all(s.is_finite() for s in update.states.values())
    return update


def body(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The tensors' table, the fields, the tensors."""
    (length,) = struct.unpack("<Q", data[wire.CHECKSUM : wire.CHECKSUM + 8])
    rest = data[wire.CHECKSUM + 8 :]
    table = json.loads(rest[:length])
    return table, json.loads(table.pop("__metadata__")["fedloom"]), rest[length:]


def forged(table: dict[str, Any], fields: Any, rest: bytes) -> bytes:
    text = json.dumps({"__metadata__": {"fedloom": json.dumps(fields)}, **table}).encode()
    return wire.seal(struct.pack("<Q", len(text)) + text + rest)


@given(updates(), st.sampled_from(CODECS))
@cases
def test_a_message_comes_back_as_it_was_but_for_what_its_codec_loses(
    sent: Update, agreed: tuple[Codec, float]
) -> None:
    codec, lost = agreed
    back = wire.unpack_update(wire.pack_update(sent, codec), codec, sent.states)
    assert (back.client, back.weight, back.metrics, back.round) == (
        sent.client,
        sent.weight,
        sent.metrics,
        sent.round,
    )
    assert back.states.keys() == sent.states.keys()
    for name, state in sent.states.items():
        assert back.states[name].keys() == state.keys()
        for key, t in state.items():
            got = back.states[name][key]
            assert got.shape == t.shape
            largest = float(t.double().abs().max()) if t.numel() else 0.0
            off = (got.double() - t.double()).abs()
            assert not t.numel() or float(off.max()) <= lost * largest + (2.0**-126 if lost else 0.0)


@given(updates(), st.sampled_from(CODECS), st.data())
@cases
def test_damage_on_the_way_is_refused_always(
    sent: Update, agreed: tuple[Codec, float], data: st.DataObject
) -> None:
    codec, _ = agreed
    packed = wire.pack_update(sent, codec)
    damaged = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(packed)) | st.just(len(packed)))
    came = bytes(damaged[:end])
    if came == packed:
        assert isinstance(outcome(came, codec, sent), Update) or not all(
            s.subnormal() * 2 <= s.numel() for s in sent.states.values()
        )
    else:
        assert outcome(came, codec, sent) == "malformed"


@given(updates(), st.sampled_from(CODECS), st.data())
@cases
def test_bytes_that_somebody_changed_and_sealed_are_refused_or_are_an_update(
    sent: Update, agreed: tuple[Codec, float], data: st.DataObject
) -> None:
    codec, _ = agreed
    changed = bytearray(wire.pack_update(sent, codec)[wire.CHECKSUM :])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    outcome(wire.seal(bytes(changed)), codec, sent)


@given(updates(), st.sampled_from(CODECS), st.data())
@cases
def test_fields_and_tables_that_say_anything_are_refused_or_are_an_update(
    sent: Update, agreed: tuple[Codec, float], data: st.DataObject
) -> None:
    codec, _ = agreed
    table, fields, rest = body(wire.pack_update(sent, codec))
    where = data.draw(st.sampled_from(["field", "fields", "entry", "table"]))
    value = data.draw(anything)
    if where == "field":
        fields[data.draw(st.sampled_from(sorted(fields)) | st.text(max_size=6))] = value
    elif where == "fields":
        fields = value
    elif where == "entry" and table:
        entry = table[data.draw(st.sampled_from(sorted(table)))]
        entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value
    else:
        table[data.draw(names)] = value
    outcome(forged(table, fields, rest), codec, sent)


@given(adapters(), st.sampled_from(CODECS), st.data())
@cases
def test_broadcasts_that_somebody_changed_are_refused_or_are_a_broadcast(
    adapter: AdapterState, agreed: tuple[Codec, float], data: st.DataObject
) -> None:
    codec, _ = agreed
    message = Broadcast(3, {"adapter": adapter}, 2)
    steps = [codec.encode(adapter)]
    packed = wire.pack_broadcast(message, codec, steps, since=1, version=2)
    table, fields, rest = body(packed)
    if data.draw(st.booleans()):
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(anything)
        came = forged(table, fields, rest)
    else:
        changed = bytearray(packed[wire.CHECKSUM :])
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        came = wire.seal(bytes(changed))
    with contextlib.suppress(RefusedUpdate):
        assert isinstance(wire.unpack_broadcast(came, codec, {1: adapter}), Broadcast)
