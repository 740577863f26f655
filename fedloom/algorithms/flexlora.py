"""FlexLoRA (Bai et al. 2024, https://arxiv.org/abs/2402.11505): average products of factors, not factors.

FedIT's mean of B times its mean of A is not the mean of the clients' updates B_k A_k. Here the server takes
that mean and sends out its best approximation at the adapter's rank. All clients share that rank; FlexLoRA's
ranks that differ by client are not implemented.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedloom.algorithms.aggregators import counted
from fedloom.algorithms.base import TRAINING, ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps

FEDIT = FedAvg()  # the client half


@dataclass(frozen=True, kw_only=True)
class FlexLoRA:
    title: ClassVar[str] = "FlexLoRA"
    paper: ClassVar[str] = "arXiv 2402.11505"
    shared: ClassVar[bool] = True
    reports: ClassVar[frozenset[str]] = TRAINING
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter)

    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast:
        return FEDIT.broadcast(state, client)

    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        return FEDIT.expects(message)

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        return FEDIT.client(message, client)

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Weighted by examples. The server needs each update: their sum (secure aggregation) will not do."""
        from fedloom.algorithms.products import mean_product  # here, because it imports torch

        ordered = sorted(counted(updates), key=lambda u: u.client)
        total = sum(update.weight for update in ordered)
        return state.next(mean_product([(u.weight / total, state.adapter + u.delta) for u in ordered]))

    def personal(self, client: Client) -> AdapterState | None:
        return None
