"""The two messages of the protocol. Whatever is not a field here never travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.state import AdapterState

ClientId = str


@dataclass(frozen=True)
class Broadcast:
    """Server to client: what this client starts the round from."""

    round: int
    states: Mapping[str, AdapterState]  # "adapter", and what the algorithm adds ("control")
    acknowledged: int | None = None  # last round that used this client's update; the transport sets it

    @property
    def adapter(self) -> AdapterState:
        return self.states["adapter"]


@dataclass(frozen=True)
class Update:
    """Client to server: the only thing that leaves a client."""

    client: ClientId
    states: Mapping[str, AdapterState]  # "delta", and what the algorithm adds
    weight: float  # number of training examples, unless the algorithm says otherwise; 0: not counted
    metrics: Mapping[str, float] = field(default_factory=dict)  # those that the algorithm names in `reports`
    round: int = 0  # the round it answers; the client's end of the transport fills it in

    @property
    def delta(self) -> AdapterState:
        return self.states["delta"]
