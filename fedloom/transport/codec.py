"""Codecs: how the tensors of a message become fewer bytes. The algorithm above them sees what arrives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import zstandard

from fedloom.errors import ConfigError, RefusedUpdate
from fedloom.state import AdapterState

if TYPE_CHECKING:  # settings load without torch
    import torch
    from torch import Tensor

    from fedloom.transport import blocks

Parts = Mapping[str, "Tensor"]  # a state as it travels


class Codec(Protocol):
    """Simulation suffers a codec's losses as a network does. NaN and infinity stay visible to the gate."""

    @property
    def error_feedback(self) -> bool: ...
    @property
    def label(self) -> str:
        """Sent with a message, so that no other codec reads it; "" for tensors as they are."""
        ...

    def encode(self, state: AdapterState) -> Parts: ...
    def decode(self, parts: Parts, like: AdapterState) -> AdapterState:
        """A state with the names, shapes and dtypes of `like`, which bounds the memory for foreign bytes.

        Raises: RefusedUpdate("malformed").
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Fp32:
    """Tensors as they are. The gate alone judges what arrives."""

    label: ClassVar[str] = ""
    error_feedback: ClassVar[bool] = False

    def encode(self, state: AdapterState) -> Parts:
        return state

    def decode(self, parts: Parts, like: AdapterState) -> AdapterState:
        return AdapterState(parts)


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """Values rounded to 8 significant bits: off by at most 1/256 of themselves, or 2^-134 if that is more."""

    label: ClassVar[str] = "bf16"
    error_feedback: bool = False

    def encode(self, state: AdapterState) -> Parts:
        import torch

        nothing = torch.empty(0, dtype=torch.bfloat16)  # torch.cat needs at least one tensor
        return {
            "values": torch.cat([nothing, *(_narrowed(t.flatten(), torch.bfloat16) for t in state.values())])
        }

    def decode(self, parts: Parts, like: AdapterState) -> AdapterState:
        import torch

        _expect(parts, {"values": torch.bfloat16})
        if parts["values"].numel() != like.numel():
            raise _malformed(f"{parts['values'].numel()} values instead of {like.numel()}")
        return _shaped(parts["values"].flatten(), like)


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Blocks of `block` values, each rounded to one of 127 steps on either side of zero."""

    block: int = 256
    zstd: bool = True
    error_feedback: bool = False

    def __post_init__(self) -> None:
        _check(self.block)

    @property
    def label(self) -> str:
        return f"int8 block={self.block} zstd={self.zstd} scale=2"  # version 2 of the scale format

    def encode(self, state: AdapterState) -> Parts:
        from fedloom.transport import blocks

        return _parts(*blocks.quantise(_flat(state), bits=8, block=self.block, levels=127), zstd=self.zstd)

    def decode(self, parts: Parts, like: AdapterState) -> AdapterState:
        return _decoded(parts, like, bits=8, block=self.block, zstd=self.zstd)


@dataclass(frozen=True, kw_only=True)
class Int4:
    """Blocks of `block` values, each rounded to one of `levels` steps on either side of zero.

    Fewer levels are coarser and compress better. Without zstd, 7 levels take no more room than 1.
    """

    block: int = 64
    levels: int = 5
    zstd: bool = True
    error_feedback: bool = False

    def __post_init__(self) -> None:
        _check(self.block)
        if not 1 <= self.levels <= 7:
            raise ConfigError(f"Expected transport.codec.levels from 1 to 7, got {self.levels}.")

    @property
    def label(self) -> str:
        return f"int4 block={self.block} zstd={self.zstd} scale=2"  # reading does not depend on the levels

    def encode(self, state: AdapterState) -> Parts:
        from fedloom.transport import blocks

        return _parts(
            *blocks.quantise(_flat(state), bits=4, block=self.block, levels=self.levels), zstd=self.zstd
        )

    def decode(self, parts: Parts, like: AdapterState) -> AdapterState:
        return _decoded(parts, like, bits=4, block=self.block, zstd=self.zstd)


def layout(state: AdapterState) -> str:
    """Hash of names and shapes: equal where one state can be decoded like the other."""
    text = json.dumps([[name, *t.shape] for name, t in state.items()])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check(block: int) -> None:
    if block < 2 or block % 2:
        raise ConfigError(f"Expected an even transport.codec.block of at least 2, got {block}.")


def _flat(state: AdapterState) -> list[Tensor]:
    return [t.flatten().float() for t in state.values()]


def _shaped(flat: Tensor, like: AdapterState) -> AdapterState:
    pieces = flat.split([t.numel() for t in like.values()])
    return AdapterState(
        {name: _narrowed(p.view(t.shape), t.dtype) for p, (name, t) in zip(pieces, like.items(), strict=True)}
    )


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to another dtype. Clamped, so that the largest finite values do not round to infinity."""
    import torch

    y, largest = x.to(dtype), torch.finfo(dtype).max
    if largest >= torch.finfo(x.dtype).max or not y.numel() or all(end.isfinite() for end in y.aminmax()):
        return y
    return torch.where(x.isfinite(), y.clamp(-largest, largest), y)


def _parts(codes: blocks.Codes, scales: blocks.Scales, *, zstd: bool) -> Parts:
    import torch

    squeeze = zstandard.ZstdCompressor(level=1).compress if zstd else bytes
    return {
        name: torch.from_numpy(np.frombuffer(squeeze(part.data), np.uint8).copy())
        for name, part in (("codes", codes), ("scales", scales.view(np.uint8)))
    }


def _decoded(parts: Parts, like: AdapterState, *, bits: int, block: int, zstd: bool) -> AdapterState:
    import torch

    from fedloom.transport import blocks

    _expect(parts, {"codes": torch.uint8, "scales": torch.uint8})
    sizes = [t.numel() for t in like.values()]
    n_codes, n_scales = blocks.room(sizes, bits=bits, block=block)
    codes = _bytes(parts["codes"], n_codes, zstd=zstd)
    scales = _bytes(parts["scales"], 2 * n_scales, zstd=zstd).view(np.uint16)
    return _shaped(blocks.restore(codes, scales, sizes, bits=bits, block=block), like)


def _bytes(part: Tensor, size: int, *, zstd: bool) -> blocks.Codes:
    data = part.flatten().numpy()
    if zstd:
        try:
            # Check the size first: the library allocates whatever size a frame claims.
            if zstandard.get_frame_parameters(data.data).content_size != size:
                raise _malformed(f"a zstd frame that does not hold {size} bytes")
            data = np.frombuffer(
                bytearray(zstandard.ZstdDecompressor().decompress(data.data, allow_extra_data=False)),
                np.uint8,
            )
        except zstandard.ZstdError as broken:
            raise _malformed(f"zstd: {broken}") from broken
    if len(data) != size:
        raise _malformed(f"{len(data)} bytes instead of {size}")
    return data


CODECS: dict[str, type[Codec]] = {"fp32": Fp32, "bf16": Bf16, "int8": Int8, "int4": Int4}


def _expect(parts: Parts, kinds: Mapping[str, torch.dtype]) -> None:
    if {name: t.dtype for name, t in parts.items()} != dict(kinds):
        raise _malformed(f"tensors other than {', '.join(kinds)}")


def _malformed(why: str) -> RefusedUpdate:
    return RefusedUpdate("malformed", f"expected a coded state, got {why}")
