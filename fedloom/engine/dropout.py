"""Dropout by counting: whether a number is dropped depends on its name, not on a generator's history.

The name is (run seed, job stream, position of the example in the stream, token position, module, feature),
so a job sees the same masks alone and in company, in one pass or in many, and when a pass is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import rng
from fedloom.rng import Name

_LOW = 0xFFFFFFFF
_CHUNK = 1 << 20  # elements hashed at a time; the 64-bit intermediates stay below 8 MiB each


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) without visible pattern; no product overflows.

    Constants: Chris Wellons, "hash-prospector", the two-round permutation of lowest known bias.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW
    return x ^ (x >> 15)


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
        columns = torch.arange(features, device=self.keys.device) * 0x9E3779B1 & _LOW
        rows = _mix(self.keys ^ salt)
        kept = torch.empty(len(rows), features, dtype=torch.bool, device=rows.device)
        step = max(1, _CHUNK // features)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            kept[part] = _mix((rows[part, None] + columns) & _LOW) >= int(self.rate * 2**32)
        return kept

    @property
    def gain(self) -> float:
        return 1.0 / (1.0 - self.rate)
