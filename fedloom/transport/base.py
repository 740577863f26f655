"""Transport: the one seam between the round loop and wherever the clients are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedloom.messages import Broadcast, ClientId, Update


@dataclass(frozen=True)
class Delivery:
    """One client's update as it arrived, with what it weighed on the wire, in bytes."""

    update: Update
    bytes_up: int
    bytes_down: int


class Transport(Protocol):
    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Delivery]:
        """Deliver each broadcast, yield each update as it arrives; a lost client yields nothing."""
        ...
