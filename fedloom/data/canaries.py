"""Canaries: secrets planted in clients' data, so that an audit can tell what a model has memorised.

A canary is the access code of a made-up person. The planted ones, their held-out twins, and the references
among which an audit ranks them are all drawn from one distribution. So for a model that has not seen a
canary, every rank among the references is equally likely: the null distribution of exposure (Carlini et al.
2019, https://arxiv.org/abs/1802.08232).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedloom.data.example import Example
from fedloom.data.microworld import FIRST, LAST, access_code
from fedloom.errors import ConfigError
from fedloom.rng import Name, numpy_stream


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Each client gets one secret for every entry of `copies`, repeated that many times."""

    copies: tuple[int, ...] = (1, 4, 16)
    digits: int = 4  # of a code

    def __post_init__(self) -> None:
        if not self.copies or min(self.copies) < 1:
            raise ConfigError(f"Expected data.canaries.copies of at least 1 each, got {list(self.copies)}.")
        if not 1 <= self.digits <= 64:
            raise ConfigError(f"Expected data.canaries.digits between 1 and 64, got {self.digits}.")

    def planted(self, client: str, *, category: str, seed: int) -> list[Example]:
        """This client's canaries with all their copies; the copies of one share its id."""
        drawn = self._draw(len(self.copies), "planted", client, seed=seed)
        named = [
            replace(e, owner=client, category=category, id=f"canary:{client}:{i}")
            for i, e in enumerate(drawn)
        ]
        return [e for e, count in zip(named, self.copies, strict=True) for _ in range(count)]

    def held_out(self, count: int, *, seed: int) -> list[Example]:
        """Twins that nobody trains on."""
        return self._draw(count, "held-out", seed=seed)

    def references(self, count: int, *, seed: int) -> list[Example]:
        """The secrets among which a canary is ranked."""
        return self._draw(count, "references", seed=seed)

    def _draw(self, count: int, *name: Name, seed: int) -> list[Example]:
        rng = numpy_stream(seed, "canaries", *name)
        return [_secret(rng, self.digits) for _ in range(count)]


def _secret(rng: np.random.Generator, digits: int) -> Example:
    name = f"{FIRST[rng.integers(len(FIRST))]} {LAST[rng.integers(len(LAST))]}"
    return access_code(name, rng.integers(0, 10, size=digits).tolist())


def copies(examples: Sequence[Example]) -> dict[Example, int]:
    """Canary -> number of its copies among a client's examples."""
    found: dict[Example, int] = {}
    for e in examples:
        if e.private:
            found[e] = found.get(e, 0) + 1
    return found
