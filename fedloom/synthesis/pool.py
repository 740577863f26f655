"""Examples from a pool instead of generated ones, to see what better or worse synthetic data would bring.

FedPIT's ablation: real held-out examples of the same kind ("ideal"), of a related domain, or of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.client import Words
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.rng import Name, numpy_stream
from fedloom.state import AdapterState
from fedloom.steps import Steps
from fedloom.synthesis.candidates import Candidate, Synthesis


@dataclass(frozen=True, kw_only=True)
class HeldBack:
    """Settings of a `FromPool` whose pool is the data that no client holds (`data.pool` sets some aside)."""

    candidates: int = 32


@dataclass(frozen=True, kw_only=True)
class OtherStyle:
    """The same with answers in a style that the federation does not use; only the microworld has one."""

    candidates: int = 32


@dataclass(frozen=True, kw_only=True)
class FromPool:
    """A synthesizer that asks no model: `candidates` of the pool without replacement, drawn by `stream`."""

    pool: Sequence[Example]
    candidates: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.candidates <= len(self.pool):
            raise ConfigError(
                f"Expected {self.candidates=} between 1 and the {len(self.pool)} examples of the pool."
            )

    def __call__(
        self,
        examples: Sequence[Example],
        adapter: AdapterState | None,
        words: Words | None,
        *,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[Synthesis]:
        yield from ()
        drawn = numpy_stream(seed, "synthesis", "pool", *stream).permutation(len(self.pool))
        return Synthesis(tuple(Candidate(self.pool[i]) for i in drawn[: self.candidates]))
