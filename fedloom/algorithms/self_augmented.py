"""Local-only tuning on local and synthetic examples: the worth of generating alone, without a federation.

LocIT+SA in FedPIT's tables. The untuned base, which every client has from the start, generates once;
after that this is `LocalOnly` with a larger set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedloom.algorithms.base import TRAINING, ServerState, answer
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.synthetic import synthesis_metrics, synthetic_examples
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps

TUNING = LocalOnly()


@dataclass(frozen=True, kw_only=True)
class SelfAugmented:
    title: ClassVar[str] = "LocIT+SA"
    paper: ClassVar[str] = "every client alone, on synthetic examples too, a baseline in arXiv 2403.06131"
    shared: ClassVar[bool] = False
    reports: ClassVar[frozenset[str]] = TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"synthesize"})

    def init(self, adapter: AdapterState) -> ServerState:
        return TUNING.init(adapter)

    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast:
        return TUNING.broadcast(state, client)

    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        return TUNING.expects(message)

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        synthetic = yield from synthetic_examples(client, message.adapter, message, every=0)
        # The copy shares this client's memory, so the adapter and the position in the order are kept.
        augmented = replace(client, examples=[*client.examples, *synthetic])
        update = yield from TUNING.client(message, augmented)
        metrics = {**update.metrics, **synthesis_metrics(client, message)}
        return answer(self, client, update.states, weight=update.weight, metrics=metrics)

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return TUNING.server(state, updates)

    def personal(self, client: Client) -> AdapterState | None:
        return TUNING.personal(client)
