"""Messages to bytes and back: a checksum, then one safetensors buffer, whose header holds the other fields.

Simulation packs its messages here too, so the bytes it reports are the bytes that a network would carry.
Foreign bytes yield a message of this schema or a RefusedUpdate; their length bounds the memory taken.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import RefusedUpdate, ShapeMismatch
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.transport.codec import Codec, Fp32, Parts, layout

SCHEMA = 2
PLAIN = 65_536  # most bytes of a header's fields
NAMED = 512  # most bytes per tensor in a header, besides its name
CHECKSUM = 16  # bytes


def pack_broadcast(
    message: Broadcast,
    codec: Codec = Fp32(),
    steps: Sequence[Parts] = (),
    *,
    since: int | None = None,
    version: int | None = None,
    experiment: str = "",
) -> bytes:
    """The message as bytes.

    With a `version`, the adapter is that version, sent as coded steps from version `since`, or whole if that
    is None.
    """
    fields: dict[str, object] = {"round": message.round, "acknowledged": message.acknowledged}
    states: dict[str, Parts] = dict(message.states)
    if version is not None:
        fields |= {"since": since, "version": version}
    if since is not None:
        del states["adapter"]
        states |= {f"step {since + n}": step for n, step in enumerate(steps, start=1)}
    return _pack("broadcast", fields, states, codec, experiment)


def unpack_broadcast(
    data: bytes,
    codec: Codec = Fp32(),
    held: MutableMapping[int, AdapterState] | None = None,
    *,
    experiment: str = "",
) -> Broadcast:
    """The broadcast. An adapter with a version is added to `held`, from which coded steps continue.

    Raises RefusedUpdate: "malformed" or "schema" for bytes that are not a broadcast of this schema,
    "experiment" or "codec" for one of another, "version" for steps from a version that is not held.
    """
    held = {} if held is None else held
    fields, states = _unpack(data, "broadcast", {"round": int}, codec, experiment)
    acknowledged, since, version = (fields.get(name) for name in ("acknowledged", "since", "version"))
    if any(n is not None and type(n) is not int for n in (acknowledged, since, version)):
        raise _malformed("broadcast", "'acknowledged', 'since' or 'version' is not a whole number")
    if since is not None:
        if version is None or not since <= version <= since + len(states):
            raise _malformed("broadcast", "its steps do not lead from version to version")
        if since not in held:
            raise RefusedUpdate("version", f"expected steps from a version held here, got steps from {since}")
        adapter = held[since]
        for n in range(since + 1, version + 1):
            try:
                adapter = adapter + codec.decode(states.pop(f"step {n}", {}), adapter)
            except ShapeMismatch as other:
                raise _malformed("broadcast", f"step {n} is of another adapter: {other}") from other
        states["adapter"] = dict(adapter)
    if "adapter" not in states:
        raise _malformed("broadcast", "it holds no adapter")
    message = Broadcast(
        fields["round"], {name: AdapterState(parts) for name, parts in states.items()}, acknowledged
    )
    if version is not None:
        held.setdefault(version, message.adapter)
    return message


def pack_update(update: Update, codec: Codec = Fp32(), *, experiment: str = "") -> bytes:
    fields: dict[str, object] = {
        "client": update.client,
        "round": update.round,
        "weight": update.weight,
        "metrics": dict(update.metrics),
    }
    if codec.label:
        fields["layouts"] = {name: layout(state) for name, state in update.states.items()}
    states = {name: codec.encode(state) for name, state in update.states.items()}
    return _pack("update", fields, states, codec, experiment)


def unpack_update(
    data: bytes, codec: Codec = Fp32(), expected: Mapping[str, AdapterState] = {}, *, experiment: str = ""
) -> Update:
    """The update. `expected` has the names of its states, and the names, shapes and dtypes of their tensors.

    Raises RefusedUpdate: "malformed" or "schema" for bytes that are not an update of this schema,
    "experiment" or "codec" for one of another, "states" or "keys" for coded states of other names or shapes.
    Fp32 carries its own names and shapes, which the gate checks.
    """
    room = PLAIN + sum(NAMED + 4 * len(name) for state in expected.values() for name in state)
    kinds = {"client": str, "round": int, "weight": int | float, "metrics": dict}
    fields, parts = _unpack(data, "update", kinds, codec, experiment, header=room)
    if codec.label:
        if parts.keys() != expected.keys():
            raise RefusedUpdate("states", f"expected {sorted(expected)}, got {len(parts)} states")
        if fields.get("layouts") != {name: layout(like) for name, like in expected.items()}:
            raise RefusedUpdate("keys", "coded states have other names or shapes than expected")
    nothing = AdapterState({})
    states = {name: codec.decode(coded, expected.get(name, nothing)) for name, coded in parts.items()}
    metrics = {}
    for name, value in fields["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _malformed("update", "a metric is not a number")
        metrics[name] = value
    return Update(fields["client"], states, fields["weight"], metrics, fields["round"])


def seal(body: bytes) -> bytes:
    """The checksum, then the body: damage in transit cannot pass for a message. It does not prove honesty."""
    return _checksum(body) + body


def _pack(
    kind: str, fields: Mapping[str, object], states: Mapping[str, Parts], codec: Codec, experiment: str
) -> bytes:
    tensors = {
        f"{state}/{name}": t.contiguous() for state, vector in states.items() for name, t in vector.items()
    }
    header: dict[str, object] = {"schema": SCHEMA, "kind": kind, "states": list(states), **fields}
    if codec.label:
        header["codec"] = codec.label
    if experiment:
        header["experiment"] = experiment
    return seal(save(tensors, {"fedloom": json.dumps(header)}))


def _unpack(
    data: bytes,
    kind: str,
    kinds: Mapping[str, Any],
    codec: Codec,
    experiment: str,
    *,
    header: int | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Fields and tensors of a message whose header has at most `header` bytes."""
    body = data[CHECKSUM:]
    if data[:CHECKSUM] != _checksum(body):
        raise _malformed(kind, "its checksum does not match")
    try:
        (length,) = struct.unpack("<Q", body[:8])
        if length > (len(body) if header is None else min(len(body), header)):
            raise ValueError(f"a header of {length} bytes")
        named = json.loads(body[8 : 8 + length], object_pairs_hook=_once)
        fields = json.loads(named["__metadata__"]["fedloom"], object_pairs_hook=_once)
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, struct.error) as broken:
        raise _malformed(kind, type(broken).__name__) from broken
    if not isinstance(fields, dict):
        raise _malformed(kind, "its header is not a table")
    if (fields.get("schema"), fields.get("kind")) != (SCHEMA, kind):
        raise RefusedUpdate(
            "schema", f"expected a fedloom {kind} of schema {SCHEMA}, got another kind or schema"
        )
    for code, ours in (("experiment", experiment), ("codec", codec.label)):
        if fields.get(code, "") != ours:
            raise RefusedUpdate(code, f"expected a fedloom {kind} of {code} {ours!r}, got another")
    for field, type_ in kinds.items():
        if not isinstance(fields.get(field), type_) or isinstance(fields[field], bool):
            raise _malformed(kind, f"{field!r} is missing or of another type")
    states_named = fields.get("states")
    if not (isinstance(states_named, list) and all(isinstance(state, str) for state in states_named)):
        raise _malformed(kind, "'states' is missing or not a list of names")
    states: dict[str, dict[str, Tensor]] = {state: {} for state in states_named}
    if len(states) < len(states_named):
        raise _malformed(kind, "a state is named twice")
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        if state not in states:
            raise _malformed(kind, "a tensor belongs to no state")
        states[state][name] = tensor
    return fields, states


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM).digest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys: parsers differ in which of two they keep."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _malformed(kind: str, why: str) -> RefusedUpdate:
    return RefusedUpdate("malformed", f"expected a fedloom {kind}, got bytes that are not one ({why})")
