"""FewFedWeight (Dong et al. 2022, https://arxiv.org/abs/2212.08354), in our own reconstruction.

Confirmed from the abstract and from FedPIT's description: the global model labels each client's own
inputs, an energy score weights these pseudo examples, and clients are averaged by how well they do. No
formula and no code were found. All formulas here are ours:

    P_k  = {(x, answer of the received model) : x in D_k}
    E_j  = -mean_t logsumexp_v logits(v | x_j, y_<t)   under the client's own model of its last round
    w_j  = |P_k| softmax(-E / tau)_j                   mean 1
    loss = NLL(D_k) + gamma w_j NLL(P_k,j)             from the received model, in shared batches
    a_k <- a_k exp(-eta v_k)                           v_k: nats per token of the trained model on D_k

The a_k start at the number of examples, live on the server, and are scaled so that a round's cohort keeps
its sum: a client loses nothing by taking part often. v_k is what a client reports; it is not verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from fedloom.algorithms.aggregators import weighted_mean
from fedloom.algorithms.base import TRAINING, Aggregator, ServerOptimizer, ServerState, answer
from fedloom.algorithms.server_optimizers import SGD
from fedloom.algorithms.synthetic import fit_anew, synthesis_metrics, synthetic_examples
from fedloom.client import Client
from fedloom.errors import ConfigError
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Score, Scored, Steps

if TYPE_CHECKING:
    from torch import Tensor

OWN_LOSS = "own_loss"  # v_k


@dataclass(frozen=True, kw_only=True)
class FewFedWeight:
    title: ClassVar[str] = "FewFedWeight"
    paper: ClassVar[str] = "arXiv 2212.08354, reconstructed"
    shared: ClassVar[bool] = True
    reports: ClassVar[frozenset[str]] = TRAINING | {OWN_LOSS}
    needs: ClassVar[frozenset[str]] = frozenset({"relabel"})

    gamma: float = 1.0
    tau: float = 1.0
    eta: float = 1.0
    server_optimizer: ServerOptimizer = field(default_factory=SGD)
    aggregate: Aggregator = weighted_mean

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and self.tau > 0 and self.eta >= 0):
            raise ConfigError(f"Expected {self.gamma=} >= 0, {self.tau=} > 0 and {self.eta=} >= 0.")

    def init(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter)

    def broadcast(self, state: ServerState, client: ClientId) -> Broadcast:
        return Broadcast(state.round, {"adapter": state.adapter})

    def expects(self, message: Broadcast) -> Mapping[str, AdapterState]:
        return {"delta": message.adapter}

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        start = message.adapter
        pseudo = yield from synthetic_examples(client, start, message, tool=client.tools.relabel)
        judged: list[Scored] = yield Score(pseudo, client.memory.get("local", start), energy=True)
        weights = [1.0] * len(client.examples)
        energies = [math.nan if s.energy is None else s.energy for s in judged]
        weights += [self.gamma * w for w in energy_weights(energies, tau=self.tau)]
        fitted = yield from fit_anew(
            client,
            start,
            [*client.examples, *pseudo],
            round=message.round,
            purpose="weighted",
            weights=weights,
        )
        client.memory["local"] = fitted.adapter
        own: list[Scored] = yield Score(client.examples, fitted.adapter)
        metrics = {
            "loss": fitted.loss,
            "steps": fitted.steps,
            "tokens": fitted.tokens,
            OWN_LOSS: sum(s.nll for s in own) / max(1, sum(s.targets for s in own)),
            **synthesis_metrics(client, message),
        }
        return answer(
            self, client, {"delta": fitted.adapter - start}, weight=len(client.examples), metrics=metrics
        )

    def server(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        import torch  # here, so that settings load without it

        arrived = sorted(updates, key=lambda u: u.client)
        known: Mapping[str, Tensor] = state.slots.get("client_weights", {})
        before = {u.client: float(known[u.client]) if u.client in known else float(u.weight) for u in arrived}
        after = adapted(before, {u.client: u.metrics.get(OWN_LOSS, math.nan) for u in arrived}, eta=self.eta)
        mean = self.aggregate(
            [replace(u, weight=after[u.client]) for u in arrived], state.adapter.zeros_like()
        )
        stepped = self.server_optimizer(state, mean["delta"])
        # A client whose loss is not a number is left out of this round and keeps its weight.
        kept = {c: torch.tensor([after[c] or before[c]], dtype=torch.float64) for c in before}
        return replace(stepped, slots={**stepped.slots, "client_weights": AdapterState({**known, **kept})})

    def personal(self, client: Client) -> AdapterState | None:
        return None


def energy_weights(energies: Sequence[float], *, tau: float) -> list[float]:
    """n softmax(-E / tau): mean 1, more for examples of low energy; 0 where the energy is not finite."""
    finite = [-e / tau for e in energies if math.isfinite(e)]
    if not finite:
        return [0.0] * len(energies)
    shares = [math.exp(-e / tau - max(finite)) if math.isfinite(e) else 0.0 for e in energies]
    return [len(energies) * share / math.fsum(shares) for share in shares]


def adapted(
    before: Mapping[ClientId, float], losses: Mapping[ClientId, float], *, eta: float
) -> dict[ClientId, float]:
    """a_k exp(-eta v_k), scaled to the sum that the same clients had before; 0 if v_k is not a valid loss."""
    sound = [c for c in before if 0 <= losses[c] < math.inf]  # no honest loss is below zero
    if not sound:
        return dict.fromkeys(before, 0.0)
    least = min(losses[c] for c in sound)
    raw = {c: before[c] * math.exp(-eta * (losses[c] - least)) if c in sound else 0.0 for c in before}
    total, had = math.fsum(raw.values()), math.fsum(before[c] for c in sound)
    return {c: value * had / total if total else 0.0 for c, value in raw.items()}
