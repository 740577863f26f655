"""FedPIT, first version (https://arxiv.org/abs/2403.06131v1): parameter-isolated training.

Each client has two adapters. The public one starts from the received adapter, is trained on synthetic
examples alone, and is all that leaves. The private one is trained on local and synthetic examples, lives
in the client's memory and never leaves it; it is the client's personal model.

Given the synthetic examples, no bit of the message that a client sends depends on its own examples: not the
delta, not the metrics (loss, steps and tokens of the public training), not the weight (the number of
synthetic examples). How many candidates were dropped, and why, stays with the client. The synthetic examples
do depend on private ones: they are generated from private demonstrations, and the filters compare them with
private texts. Filters and audits exist for this path.

Reconstructed from the abstract: the paper's algorithm listing was not available.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from fedloom.algorithms.averaging import PERSONAL, Averaging
from fedloom.algorithms.base import ServerState, answer
from fedloom.algorithms.synthetic import fit_anew, synthesis_metrics, synthetic_examples
from fedloom.client import Client
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps


@dataclass(frozen=True, kw_only=True)
class FedPIT(Averaging):
    title: ClassVar[str] = "FedPIT"
    paper: ClassVar[str] = "arXiv 2403.06131v1"
    needs: ClassVar[frozenset[str]] = frozenset({"synthesize"})

    every: int = 1  # rounds between generations; 0: only once

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        start = message.adapter
        synthetic = yield from synthetic_examples(client, start, message, every=self.every)

        own: AdapterState = client.memory.get(PERSONAL, start)
        private = yield from fit_anew(
            client, own, [*client.examples, *synthetic], round=message.round, purpose="private"
        )
        client.memory[PERSONAL] = private.adapter

        public = yield from fit_anew(client, start, synthetic, round=message.round, purpose="public")
        metrics = {"steps": public.steps, "tokens": public.tokens, **synthesis_metrics(client, message)}
        if synthetic:
            metrics["loss"] = public.loss
        return answer(self, client, {"delta": public.adapter - start}, weight=len(synthetic), metrics=metrics)

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """As FedAvg; if no client has a synthetic example, the adapter stays as it is."""
        learnt = (update for update in updates if update.weight > 0)
        first = next(learnt, None)
        if first is None:
            return state.next(state.adapter)
        return super().server(state, chain([first], learnt))
