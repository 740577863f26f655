"""What an algorithm is: a client half, a server half, and the state between rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps

TRAINING = frozenset({"loss", "steps", "tokens"})  # metrics of a client's training
UNSENT = "unsent metrics"  # key in a client's memory of the last answer's metrics that were not sent


@dataclass(frozen=True)
class ServerState:
    """All that an algorithm keeps on the server between rounds; a checkpoint holds the whole of it."""

    adapter: AdapterState
    round: int = 0  # rounds completed
    slots: Mapping[str, AdapterState] = field(default_factory=dict)  # "m", "v", "control", "merged"

    def next(self, adapter: AdapterState, **slots: AdapterState) -> ServerState:
        return replace(self, adapter=adapter, round=self.round + 1, slots={**self.slots, **slots})


class Algorithm(Protocol):
    """One paper, both halves. The server half never sees a `Client`, only what it sent."""

    title: ClassVar[str]  # its name on pages and in tables
    paper: ClassVar[str]  # its source, as a model card cites it
    shared: ClassVar[bool]  # whether the server's adapter is trained, and so a result
    reports: ClassVar[frozenset[str]]  # the metrics that are sent; all others stay with the client
    needs: ClassVar[frozenset[str]]  # which of its clients' `Tools` it uses

    def init(self, adapter: AdapterState) -> ServerState: ...
    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast: ...
    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        """The states that an answer to this message must hold; only names, shapes and dtypes matter.

        {} where nothing is uploaded. The gate refuses anything else, and a codec cannot read it.
        """
        ...

    def client(self, message: Broadcast, client: Client) -> Steps[Update]: ...
    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The next state. `updates` arrive by client id while other clients still train.

        An algorithm that keeps none of them needs no memory for the cohort.
        """
        ...

    def personal(self, client: Client) -> AdapterState | None:
        """A client's personal model, if the algorithm makes one; it never leaves the client."""
        ...


def answer(
    algorithm: Algorithm,
    client: Client,
    states: Mapping[str, AdapterState],
    *,
    weight: float,
    metrics: Mapping[str, float],
) -> Update:
    """What a client sends. Metrics that the algorithm does not report stay in the client's memory."""
    client.memory.pop(UNSENT, None)
    if kept := {name: value for name, value in metrics.items() if name not in algorithm.reports}:
        client.memory[UNSENT] = kept
    return Update(
        client.id,
        states,
        weight,
        {name: value for name, value in metrics.items() if name in algorithm.reports},
    )


Aggregator = Callable[
    [Iterable[Update], AdapterState], Mapping[str, AdapterState]
]  # (updates, zero) -> means


class ServerOptimizer(Protocol):
    def __call__(self, state: ServerState, delta: AdapterState) -> ServerState:
        """The next state, one step along the mean delta of a cohort."""
        ...
