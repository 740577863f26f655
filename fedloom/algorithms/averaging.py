"""The family that averages deltas. Members differ only in what a client does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedloom.algorithms.aggregators import weighted_mean
from fedloom.algorithms.base import TRAINING, Aggregator, ServerOptimizer, ServerState
from fedloom.algorithms.server_optimizers import SGD
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps

PERSONAL = "personal"  # key of a client's own adapter in its memory


@dataclass(frozen=True, kw_only=True)
class Averaging(ABC):
    """Server half of FedOpt (Reddi et al. 2021): average the deltas, take one optimizer step."""

    title: ClassVar[str]
    paper: ClassVar[str]
    shared: ClassVar[bool] = True
    reports: ClassVar[frozenset[str]] = TRAINING
    needs: ClassVar[frozenset[str]] = frozenset()

    server_optimizer: ServerOptimizer = SGD(lr=1.0)
    aggregate: Aggregator = weighted_mean

    def init(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter)

    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast:
        return Broadcast(state.round, {"adapter": state.adapter})

    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        return {"delta": message.adapter}

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean = self.aggregate(updates, state.adapter.zeros_like())
        return self.server_optimizer(state, mean["delta"])

    def personal(self, client: Client) -> AdapterState | None:
        return client.memory.get(PERSONAL)

    @abstractmethod
    def client(self, message: Broadcast, client: Client) -> Steps[Update]: ...
