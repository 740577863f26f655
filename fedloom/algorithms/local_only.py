"""Local-only tuning: every client trains alone and no model is shared. The floor for FedIT and FedPIT.

Each client continues from its own adapter, which lives in its memory and never leaves it. Its reports
(loss, steps, tokens, number of examples) serve only the record of a comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedloom.algorithms.base import TRAINING, ServerState, answer
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps


@dataclass(frozen=True, kw_only=True)
class LocalOnly:
    title: ClassVar[str] = "LocIT"
    paper: ClassVar[str] = "every client alone, a baseline in arXiv 2403.06131"
    shared: ClassVar[bool] = False
    reports: ClassVar[frozenset[str]] = TRAINING
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter)

    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast:
        return Broadcast(state.round, {"adapter": state.adapter})  # what a new client starts from

    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        return {}

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        start: AdapterState = client.memory.get("adapter", message.adapter)
        fitted = yield from client.fit(start, round=message.round)
        client.memory["adapter"] = fitted.adapter
        metrics = {"loss": fitted.loss, "steps": fitted.steps, "tokens": fitted.tokens}
        return answer(self, client, {}, weight=len(client.examples), metrics=metrics)

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return state.next(state.adapter)

    def personal(self, client: Client) -> AdapterState | None:
        return client.memory.get("adapter")
