"""Messages to bytes and back: one safetensors buffer a message, its other fields in the header.

Simulation sends its messages through here too, so that the bytes it reports are the bytes that travel.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedloom.errors import RefusedUpdate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState

SCHEMA = 1


def pack_broadcast(message: Broadcast) -> bytes:
    return _pack({"kind": "broadcast", "round": message.round, "task": message.task}, message.states)


def unpack_broadcast(data: bytes) -> Broadcast:
    fields, states = _unpack(data, "broadcast")
    return Broadcast(fields["round"], states, fields["task"])


def pack_update(update: Update) -> bytes:
    fields = {"kind": "update", "client": update.client, "weight": update.weight, "metrics": dict(update.metrics)}
    return _pack(fields, update.states)


def unpack_update(data: bytes) -> Update:
    """Raises RefusedUpdate("malformed") for bytes that are not an update of this schema."""
    fields, states = _unpack(data, "update")
    return Update(fields["client"], states, fields["weight"], fields["metrics"])


def _pack(fields: Mapping[str, object], states: Mapping[str, AdapterState]) -> bytes:
    tensors = {f"{state}/{name}": t.contiguous() for state, vector in states.items() for name, t in vector.items()}
    header = {"schema": SCHEMA, "states": list(states), **fields}
    return save(tensors, {"fedloom": json.dumps(header)})


def _unpack(data: bytes, kind: str) -> tuple[dict, dict[str, AdapterState]]:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedloom"])
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as broken:
        raise RefusedUpdate("malformed", f"expected a fedloom {kind}, got bytes that are not one ({broken})") from broken
    if (fields.get("schema"), fields.get("kind")) != (SCHEMA, kind):
        raise RefusedUpdate(
            "schema", f"expected a {kind} of schema {SCHEMA}, got {fields.get('kind')!r} of schema {fields.get('schema')!r}"
        )
    states: dict[str, dict] = {state: {} for state in fields["states"]}
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        states[state][name] = tensor
    return fields, {state: AdapterState(named) for state, named in states.items()}
