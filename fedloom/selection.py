"""Who takes part in a round.

A selector is called with a round number and returns the cohort, sorted by client id. It keeps nothing
between calls: the cohort is a function of (seed, round) alone, so a resumed run selects as the
undisturbed one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom import rng
from fedloom.errors import ConfigError
from fedloom.messages import ClientId

Selector = Callable[[int], Sequence[ClientId]]  # round -> cohort


@dataclass(frozen=True)
class All:
    """Every client, every round. `seed` is not used; it is here so that all selectors are built alike."""

    clients: Sequence[ClientId]
    seed: int = 0

    def __post_init__(self) -> None:
        _check_clients(self.clients)

    def __call__(self, round: int) -> list[ClientId]:
        return sorted(self.clients)


@dataclass(frozen=True)
class Fixed:
    """`count` clients, uniformly, without replacement."""

    clients: Sequence[ClientId]
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        _check_count(self.count, self.clients)

    def __call__(self, round: int) -> list[ClientId]:
        return _draw(self.clients, self.count, self.seed, round)


@dataclass(frozen=True)
class Fraction:
    """This fraction of the clients, rounded down but at least one: FedIT's max(int(fraction * N), 1)."""

    clients: Sequence[ClientId]
    seed: int = 0
    fraction: float = 0.1  # C in the FedAvg paper

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"Expected fraction in (0, 1], got fraction={self.fraction}.")

    @property
    def count(self) -> int:
        # 0.29 * 100 is 28.999999999999996: without the nudge the cohort would lose a client.
        return max(1, int(self.fraction * len(self.clients) + 1e-9))

    def __call__(self, round: int) -> list[ClientId]:
        return _draw(self.clients, self.count, self.seed, round)


@dataclass(frozen=True)
class RoundRobin:
    """The next `count` clients of one shuffled circle.

    After N rounds each of the N clients has taken part exactly `count` times.
    """

    clients: Sequence[ClientId]
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        _check_count(self.count, self.clients)

    def __call__(self, round: int) -> list[ClientId]:
        circle = rng.numpy_stream(self.seed, "select", "circle").permutation(sorted(self.clients)).tolist()
        start = round * self.count
        return sorted(circle[(start + i) % len(circle)] for i in range(self.count))


@dataclass(frozen=True)
class Poisson:
    """Each client independently with probability `rate`, so a cohort may be empty.

    The sampling that central differential privacy accounts for.
    """

    clients: Sequence[ClientId]
    seed: int = 0
    rate: float = 0.1  # q in the privacy literature

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        if not 0 < self.rate <= 1:
            raise ConfigError(f"Expected rate in (0, 1], got rate={self.rate}.")

    def __call__(self, round: int) -> list[ClientId]:
        clients = sorted(self.clients)
        taken = rng.numpy_stream(self.seed, "select", round).random(len(clients)) < self.rate
        return [client for client, take in zip(clients, taken, strict=True) if take]


SELECTORS: dict[str, Callable[..., Any]] = {
    "all": All,
    "fixed": Fixed,
    "fraction": Fraction,
    "round_robin": RoundRobin,
    "poisson": Poisson,
}


def _draw(clients: Sequence[ClientId], count: int, seed: int, round: int) -> list[ClientId]:
    # Sorted first: a cohort must not depend on the order in which clients happened to be listed.
    clients = sorted(clients)
    drawn = rng.numpy_stream(seed, "select", round).choice(len(clients), count, replace=False)
    return [clients[i] for i in np.sort(drawn)]


def _check_clients(clients: Sequence[ClientId]) -> None:
    if not clients:
        raise ConfigError("Expected at least one client to select from, got none.")
    if len(set(clients)) < len(clients):
        twice = next(c for i, c in enumerate(clients) if c in clients[:i])
        raise ConfigError(f"Client ids must be unique; {twice!r} is listed twice.")


def _check_count(count: int, clients: Sequence[ClientId]) -> None:
    if not 1 <= count <= len(clients):
        raise ConfigError(f"Expected count between 1 and the {len(clients)} clients there are, got {count=}.")
