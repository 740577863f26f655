"""Dropout by counting: whether a number is dropped depends on its name, not on a generator's history.

The name is (run seed, job stream, position of the example in the stream, token position, module, feature),
so a job sees the same masks alone and beside others, in one pass or in many, and when a pass is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import rng
from fedloom.rng import Name

_LOW = 0xFFFFFFFF
_CHUNK = {
    "cpu": 1 << 18,
    "cuda": 1 << 26,
}  # numbers hashed at a time: what a cache holds, what a launch is worth
_SIGN = -(1 << 31)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) without visible pattern; no product overflows.

    Constants: Chris Wellons, "hash-prospector", the two-round permutation of lowest known bias.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW
    return x ^ (x >> 15)


def _mix_(x: Tensor) -> Tensor:
    """`_mix` in place, of 32-bit integers held in int32, whose products wrap around: ten times as fast."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # int32 shifts its sign in
    x *= 0x21F0AAAD
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x735A2D97
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    return x


def token_keys(seed: int, stream: tuple[Name, ...], position: int, length: int) -> Tensor:
    """One 32-bit key a token of the example at `position` of a job's stream: (length,) int64."""
    example = rng.key(seed, "dropout", *stream, position)
    keys = _mix((torch.arange(length) + (example >> 32)) & _LOW)
    return _mix(keys ^ (example & _LOW))


@dataclass(frozen=True)
class Dropout:
    rate: float
    seed: int
    keys: Tensor  # (T,) int64, one for each token of the pass

    def keep(self, module: str, features: int) -> Tensor:
        """Which inputs of a module survive: (T, features) bool. Survivors are scaled by `gain`."""
        salt = rng.key(self.seed, "dropout module", module) & _LOW
        columns = (torch.arange(features, device=self.keys.device) * 0x9E3779B1 & _LOW).to(torch.int32)
        rows = _mix(self.keys ^ salt).to(torch.int32)
        lowest = int(self.rate * 2**32) + _SIGN  # with the sign bit turned over, int32 compares as unsigned
        kept = torch.empty(len(rows), features, dtype=torch.bool, device=rows.device)
        step = max(1, _CHUNK.get(rows.device.type, 1 << 20) // features)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            torch.ge(_mix_(rows[part, None] + columns).bitwise_xor_(_SIGN), lowest, out=kept[part])
        return kept

    @property
    def gain(self) -> float:
        return 1.0 / (1.0 - self.rate)
