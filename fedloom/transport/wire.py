"""Messages to bytes and back: one safetensors buffer a message, its other fields in the header.

Simulation sends its messages through here too, so that the bytes it reports are the bytes that travel.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import RefusedUpdate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState

SCHEMA = 1


def pack_broadcast(message: Broadcast) -> bytes:
    return _pack({"kind": "broadcast", "round": message.round, "task": message.task}, message.states)


def unpack_broadcast(data: bytes) -> Broadcast:
    """Raises RefusedUpdate("malformed" or "schema") for bytes that are not a broadcast of this schema."""
    fields, states = _unpack(data, "broadcast", {"round": int, "task": str})
    return Broadcast(fields["round"], states, fields["task"])


def pack_update(update: Update) -> bytes:
    fields = {"kind": "update", "client": update.client, "weight": update.weight, "metrics": dict(update.metrics)}
    return _pack(fields, update.states)


def unpack_update(data: bytes) -> Update:
    """Raises RefusedUpdate("malformed" or "schema") for bytes that are not an update of this schema."""
    fields, states = _unpack(data, "update", {"client": str, "weight": int | float, "metrics": dict})
    if strange := [name for name, value in fields["metrics"].items() if not isinstance(value, int | float)]:
        raise _malformed("update", f"metric {strange[0]!r} is not a number")
    return Update(fields["client"], states, fields["weight"], fields["metrics"])


def _pack(fields: Mapping[str, object], states: Mapping[str, AdapterState]) -> bytes:
    tensors = {f"{state}/{name}": t.contiguous() for state, vector in states.items() for name, t in vector.items()}
    header = {"schema": SCHEMA, "states": list(states), **fields}
    return save(tensors, {"fedloom": json.dumps(header)})


def _unpack(
    data: bytes, kind: str, expected: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, AdapterState]]:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedloom"])
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, struct.error) as broken:
        raise _malformed(kind, f"{type(broken).__name__}: {broken}") from broken
    if not isinstance(fields, dict):
        raise _malformed(kind, "its header is not a table")
    if (fields.get("schema"), fields.get("kind")) != (SCHEMA, kind):
        raise RefusedUpdate(
            "schema", f"expected a {kind} of schema {SCHEMA}, got {fields.get('kind')!r} of schema {fields.get('schema')!r}"
        )
    for field, type_ in expected.items():
        if not isinstance(fields.get(field), type_) or isinstance(fields[field], bool):
            raise _malformed(kind, f"{field!r} is missing or of another type")
    named = fields.get("states")
    if not (isinstance(named, list) and all(isinstance(state, str) for state in named)):
        raise _malformed(kind, "'states' is missing or no list of names")
    states: dict[str, dict[str, Tensor]] = {state: {} for state in named}
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        if state not in states:
            raise _malformed(kind, f"tensor {key!r} belongs to no state")
        states[state][name] = tensor
    return fields, {state: AdapterState(tensors) for state, tensors in states.items()}


def _malformed(kind: str, why: str) -> RefusedUpdate:
    return RefusedUpdate("malformed", f"expected a fedloom {kind}, got bytes that are not one ({why})")
