"""One seed, many named streams: randomness is a pure function of its name.

No generator lives between calls, so a result does not depend on the order of clients, on the batch
width, or on how often a run was killed and resumed, and nothing random is ever checkpointed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # settings are read without waiting for torch
    import torch

Name = str | int


def key(seed: int, *name: Name) -> int:
    """A 63-bit integer that belongs to this seed and name alone.

    >>> key(0, "order", "client-1", 3) == key(0, "order", "client-1", 3)
    True
    >>> key(0, "a", "bc") == key(0, "ab", "c")
    False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *name: Name) -> torch.Generator:
    """A fresh torch generator for this name, on the CPU."""
    import torch

    return torch.Generator().manual_seed(key(seed, *name))


def numpy_stream(seed: int, *name: Name) -> np.random.Generator:
    """The same for numpy, whose distributions torch lacks."""
    return np.random.default_rng(key(seed, *name))
