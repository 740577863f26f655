"""Transport: the one seam between the round loop and wherever the clients are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState


@dataclass(frozen=True)
class Arrival:
    """An answer that has reached the server, not yet opened.

    Sender and size are known before any of it is parsed: the gate calls `open` only after judging both.
    """

    client: ClientId  # whom the channel authenticated, whatever the message says
    bytes_up: int
    bytes_down: int
    open: Callable[[], Update]  # raises RefusedUpdate


@dataclass(frozen=True)
class Snapshot:
    """A transport's state between rounds: AdapterStates and JSON values, so that it can be saved."""

    server: Mapping[str, Any] = field(default_factory=dict)  # versions sent, who holds which
    # For simulated clients. On a network clients keep their own, and these are empty.
    memories: Mapping[ClientId, Mapping[str, Any]] = field(default_factory=dict)
    residuals: Mapping[ClientId, Mapping[str, AdapterState]] = field(default_factory=dict)


class Transport(Protocol):
    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Arrival]:
        """Deliver each broadcast, yield each answer as it arrives; a lost client yields nothing."""
        ...

    def settle(self, round: int, used: Collection[ClientId]) -> None:
        """The round is over and used these clients' updates: they, and no others, may remember it."""
        ...

    def snapshot(self) -> Snapshot:
        """Taken between rounds. After `restore` the next exchange sends the same bytes it would have sent."""
        ...

    def restore(self, snapshot: Snapshot) -> None: ...
