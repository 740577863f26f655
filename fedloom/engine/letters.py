"""Requests and answers as bytes, for engines in other processes: a JSON header and one safetensors buffer.

Only the types in `fedloom.steps` can be written, and reading runs no code except their constructors: nothing
is pickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedloom import steps
from fedloom.state import AdapterState
from fedloom.steps import Tokens

KINDS: Mapping[str, Any] = {
    kind.__name__: kind for kind in vars(steps).values() if isinstance(kind, type) and is_dataclass(kind)
}
_LENGTH = struct.Struct("<Q")  # bytes of the header


def pack(value: Any) -> bytes:
    """Write any nesting of JSON values, tuples, sets, tensors, adapters and dataclasses of `fedloom.steps`.

    An adapter or example that occurs several times is written once, and is again one object when read.
    Raises TypeError for anything else.
    """
    writer = _Writer()
    header = json.dumps(writer.plain(value)).encode()
    return _LENGTH.pack(len(header)) + header + save(writer.buffer())


def unpack(data: bytes) -> Any:
    start = _LENGTH.size
    [length] = _LENGTH.unpack_from(data)
    reader = _Reader(load(data[start + length :]))
    return reader.value(json.loads(data[start : start + length]))


class _Writer:
    """JSON values stand for themselves; any other value becomes a JSON object whose only key is its type."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._ids: list[int] = []  # tokens of all examples, end to end
        self._labelled: list[bool] = []
        self._written: dict[int, tuple[Any, Any]] = {}  # keeps the object, so that its id is not reused

    def plain(self, value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, AdapterState | Tokens):
            if id(value) not in self._written:
                self._written[id(value)] = value, self._once(value)
            return self._written[id(value)][1]
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if type(value).__name__ in KINDS:
            named = {f.name: self.plain(getattr(value, f.name)) for f in fields(value)}
            return {type(value).__name__: named}
        if isinstance(value, Mapping):
            return {"dict": [[self.plain(key), self.plain(of)] for key, of in value.items()]}
        if isinstance(value, frozenset | set):
            return {"set": [self.plain(each) for each in sorted(value)]}
        if isinstance(value, tuple):
            return {"tuple": [self.plain(each) for each in value]}
        if isinstance(value, Sequence):
            return [self.plain(each) for each in value]
        raise TypeError(f"Expected a request or an answer of fedloom.steps, got a {type(value).__name__}.")

    def buffer(self) -> dict[str, Tensor]:
        return self._tensors | {
            "ids": torch.tensor(self._ids, dtype=torch.int32),
            "labelled": torch.tensor(self._labelled, dtype=torch.bool),
        }

    def _once(self, value: AdapterState | Tokens) -> dict[str, Any]:
        if isinstance(value, AdapterState):
            return {"state": {name: self._tensor(tensor) for name, tensor in value.items()}}
        start = len(self._ids)
        self._ids += value.ids
        self._labelled += value.labelled
        return {"tokens": [start, len(self._ids)]}

    def _tensor(self, tensor: Tensor) -> str:
        name = f"tensor {len(self._tensors)}"
        # A copy, because tensors in a safetensors buffer must not share memory.
        self._tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return name


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._ids = tensors["ids"].tolist()
        self._labelled = tensors["labelled"].tolist()
        self._read: dict[str, Any] = {}  # adapters and examples by their references

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.value(each) for each in plain]
        if not isinstance(plain, dict):
            return plain
        [(kind, content)] = plain.items()
        if kind in ("state", "tokens"):
            name = str(content)
            if name not in self._read:
                self._read[name] = self._once(kind, content)
            return self._read[name]
        if kind == "tensor":
            return self._tensors[content]
        if kind == "dict":
            return {self.value(key): self.value(of) for key, of in content}
        if kind == "set":
            return frozenset(self.value(each) for each in content)
        if kind == "tuple":
            return tuple(self.value(each) for each in content)
        return KINDS[kind](**{name: self.value(of) for name, of in content.items()})

    def _once(self, kind: str, content: Any) -> AdapterState | Tokens:
        if kind == "state":
            return AdapterState({name: self._tensors[place] for name, place in content.items()})
        start, end = content
        return Tokens(tuple(self._ids[start:end]), tuple(self._labelled[start:end]))
