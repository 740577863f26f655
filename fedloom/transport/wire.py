"""Messages to bytes and back: one safetensors buffer a message, its other fields in the header.

Simulation sends its messages through here too, so that the bytes it reports are the bytes that travel.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import RefusedUpdate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.transport.codec import Codec, Fp32, Parts, layout

SCHEMA = 1
NOTHING = AdapterState({})


def pack_broadcast(message: Broadcast) -> bytes:
    return _pack({"kind": "broadcast", "round": message.round, "task": message.task}, message.states)


def unpack_broadcast(data: bytes) -> Broadcast:
    """Raises RefusedUpdate("malformed" or "schema") for bytes that are not a broadcast of this schema."""
    fields, states = _unpack(data, "broadcast", {"round": int, "task": str})
    return Broadcast(
        fields["round"], {name: AdapterState(parts) for name, parts in states.items()}, fields["task"]
    )


def pack_versioned(
    message: Broadcast, steps: Sequence[Parts], codec: Codec, *, since: int | None, version: int
) -> bytes:
    """The adapter as coded steps from version `since` to `version`; as it is where `since` is None."""
    fields = {
        "kind": "broadcast",
        "round": message.round,
        "task": message.task,
        "codec": codec.label,
        "since": since,
        "version": version,
    }
    states: dict[str, Parts] = {
        name: state for name, state in message.states.items() if since is None or name != "adapter"
    }
    return _pack(
        fields, states | {f"step {version - len(steps) + n}": step for n, step in enumerate(steps, start=1)}
    )


def unpack_versioned(data: bytes, codec: Codec, held: Callable[[int], AdapterState]) -> tuple[Broadcast, int]:
    """The broadcast and the version of its adapter; `held` is asked for the adapter the steps start from.

    Raises RefusedUpdate("malformed", "schema" or "codec"), and whatever `held` raises for a version it has not.
    """
    fields, states = _unpack(data, "broadcast", {"round": int, "task": str, "version": int})
    _check_codec(fields, codec, "broadcast")
    since, version = fields.get("since"), fields["version"]
    if since is not None:
        if type(since) is not int or not since <= version <= since + len(states):
            raise _malformed("broadcast", "its steps do not lead from version to version")
        adapter = held(since)
        for n in range(since + 1, version + 1):
            adapter = adapter + codec.decode(states.pop(f"step {n}", {}), adapter)
        states["adapter"] = dict(adapter)
    return Broadcast(
        fields["round"], {name: AdapterState(parts) for name, parts in states.items()}, fields["task"]
    ), version


def pack_update(update: Update, codec: Codec = Fp32()) -> bytes:
    fields: dict[str, object] = {
        "kind": "update",
        "client": update.client,
        "weight": update.weight,
        "metrics": dict(update.metrics),
    }
    if codec.label:
        fields["codec"] = codec.label
        fields["layouts"] = {name: layout(state) for name, state in update.states.items()}
    return _pack(fields, {name: codec.encode(state) for name, state in update.states.items()})


def unpack_update(data: bytes, codec: Codec = Fp32(), like: AdapterState = NOTHING) -> Update:
    """An update whose states were coded; `like` is the adapter that was broadcast.

    Raises RefusedUpdate: "malformed" or "schema" for bytes that are not an update of this schema, "codec" for one
    of another codec, "keys" for states of other names or shapes than `like`, which no codec but Fp32 can tell.
    """
    fields, parts = _unpack(data, "update", {"client": str, "weight": int | float, "metrics": dict})
    _check_codec(fields, codec, "update")
    if codec.label and fields.get("layouts") != dict.fromkeys(parts, layout(like)):
        raise RefusedUpdate(
            "keys", "coded states have other names or shapes than the adapter that was broadcast"
        )
    states = {name: codec.decode(coded, like) for name, coded in parts.items()}
    if strange := [name for name, value in fields["metrics"].items() if not isinstance(value, int | float)]:
        raise _malformed("update", f"metric {strange[0]!r} is not a number")
    return Update(fields["client"], states, fields["weight"], fields["metrics"])


def _pack(fields: Mapping[str, object], states: Mapping[str, Parts]) -> bytes:
    tensors = {
        f"{state}/{name}": t.contiguous() for state, vector in states.items() for name, t in vector.items()
    }
    header = {"schema": SCHEMA, "states": list(states), **fields}
    return save(tensors, {"fedloom": json.dumps(header)})


def _unpack(
    data: bytes, kind: str, expected: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
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
            "schema",
            f"expected a {kind} of schema {SCHEMA}, got {fields.get('kind')!r} of schema {fields.get('schema')!r}",
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
    return fields, states


def _check_codec(fields: Mapping[str, Any], codec: Codec, kind: str) -> None:
    if (label := fields.get("codec", "")) != codec.label:
        raise RefusedUpdate("codec", f"expected a fedloom {kind} in codec {codec.label!r}, got {label!r}")


def _malformed(kind: str, why: str) -> RefusedUpdate:
    return RefusedUpdate("malformed", f"expected a fedloom {kind}, got bytes that are not one ({why})")
