"""Who takes part in a round.

A selector is called with all clients, the run's seed and a round, and returns the cohort, sorted by client
id. It keeps nothing between calls: the cohort depends on these three alone, so a resumed run selects the same
clients as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedloom import rng
from fedloom.errors import ConfigError
from fedloom.messages import ClientId


class Selector(Protocol):
    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        """The cohort. Raises: ConfigError, if there are too few clients or one is listed twice."""
        ...


@dataclass(frozen=True)
class All:
    """Every client, every round."""

    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        return _checked(clients)


@dataclass(frozen=True)
class Uniform:
    """`count` clients, uniformly, without replacement."""

    count: int = 1

    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        return _draw(_checked(clients, self.count), self.count, seed, round)


@dataclass(frozen=True)
class Fraction:
    """This fraction of the clients, rounded down but at least one: FedIT's max(int(fraction * N), 1)."""

    fraction: float = 0.1  # C in the FedAvg paper

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"Expected fraction in (0, 1], got fraction={self.fraction}.")

    def count(self, clients: int) -> int:
        # 0.29 * 100 is 28.999999999999996: without the nudge the cohort would lose a client.
        return max(1, int(self.fraction * clients + 1e-9))

    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        return _draw(_checked(clients), self.count(len(clients)), seed, round)


@dataclass(frozen=True)
class RoundRobin:
    """The next `count` clients of one shuffled circle.

    After N rounds each of the N clients has taken part exactly `count` times.
    """

    count: int = 1

    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        among = _checked(clients, self.count)
        circle = rng.numpy_stream(seed, "select", "circle").permutation(among).tolist()
        start = round * self.count
        return sorted(circle[(start + i) % len(circle)] for i in range(self.count))


@dataclass(frozen=True)
class Poisson:
    """Each client independently with probability `rate`, so a cohort may be empty.

    Privacy accounting for central differential privacy assumes this sampling.
    """

    rate: float = 0.1  # q in the privacy literature

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"Expected rate in (0, 1], got rate={self.rate}.")

    def __call__(self, clients: Sequence[ClientId], seed: int, round: int) -> list[ClientId]:
        among = _checked(clients)
        taken = rng.numpy_stream(seed, "select", round).random(len(among)) < self.rate
        return [client for client, take in zip(among, taken, strict=True) if take]


SELECTORS: dict[str, type[Selector]] = {
    "all": All,
    "uniform": Uniform,
    "fraction": Fraction,
    "round_robin": RoundRobin,
    "poisson": Poisson,
}


def _draw(among: Sequence[ClientId], count: int, seed: int, round: int) -> list[ClientId]:
    drawn = rng.numpy_stream(seed, "select", round).choice(len(among), count, replace=False)
    return [among[i] for i in np.sort(drawn)]


def _checked(clients: Sequence[ClientId], count: int = 1) -> list[ClientId]:
    """The clients, sorted: a cohort must not depend on the order in which they are listed."""
    if not clients:
        raise ConfigError("Expected at least one client to select from, got none.")
    if len(set(clients)) < len(clients):
        twice = next(c for i, c in enumerate(clients) if c in clients[:i])
        raise ConfigError(f"Client ids must be unique; {twice!r} is listed twice.")
    if not 1 <= count <= len(clients):
        raise ConfigError(
            f"Expected count between 1 and {len(clients)}, the number of clients, got {count=}."
        )
    return sorted(clients)
