"""One seed, many named streams: randomness is a pure function of its name.

No generator lives between calls. So a result does not depend on the order of clients, on the batch
width, or on how often a run was killed and resumed, and no random state is ever checkpointed.
"""

from __future__ import annotations

import hashlib

import numpy as np

Name = str | int


def key(seed: int, *name: Name) -> int:
    """A 63-bit integer for this seed and name; expect the first collision after some 10^9 names.

    >>> key(0, "order", "client-1", 3) == key(0, "order", "client-1", 3)
    True
    >>> key(0, "a", "bc") == key(0, "ab", "c")
    False
    """
    parts = (
        f"{type(part).__name__}:{part}".replace("\x1f", "\x1f\x1f") for part in (seed, *name)
    )  # a doubled \x1f is part of a name, not a separator
    text = "\x1f".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def numpy_stream(seed: int, *name: Name) -> np.random.Generator:
    """A fresh generator for this name. It is seeded with the whole key; torch's would use 32 bits of it."""
    return np.random.default_rng(key(seed, *name))
