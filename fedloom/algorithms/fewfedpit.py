"""FewFedPIT, in its journal version PPFedIT (https://arxiv.org/abs/2403.06131v3), Algorithm 1.

Each round a client makes synthetic examples with the model it has received, trains a private adapter on
its own examples, keeps the synthetic examples that this private adapter finds easiest to follow, trains
a public adapter on those, and uploads only a mix of the two. Both start from the received adapter, and
neither survives the round.

With a private share of 1 this is FedIT, to the bit. The upload depends on private examples at every
share: above 0 through the private adapter, at 0 through the choice of examples that were made and
selected. At every share a client also sends in the clear the loss, steps and tokens of its private
training and, as its weight, the number of its private examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom import lora
from fedloom.algorithms.averaging import Averaging
from fedloom.algorithms.base import answer
from fedloom.algorithms.synthetic import (
    Rule,
    fit_anew,
    select,
    synthesis_metrics,
    synthetic_examples,
)
from fedloom.client import Client
from fedloom.errors import ConfigError
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import Steps


@dataclass(frozen=True, kw_only=True)
class FewFedPIT(Averaging):
    title: ClassVar[str] = "FewFedPIT"
    paper: ClassVar[str] = "arXiv 2403.06131v3"
    needs: ClassVar[frozenset[str]] = frozenset({"synthesize", "contrast"})

    private_share: float = 0.5  # beta
    keep: int = 16  # M: synthetic examples trained on in a round
    rule: Rule = "ifs"  # how they are chosen
    drop_unhelpful: bool = False  # drop those whose response is no likelier after the instruction than alone
    every: int = 1  # rounds between generations; 0: only once

    def __post_init__(self) -> None:
        if not 0 <= self.private_share <= 1:
            raise ConfigError(f"Expected algorithm.private_share in [0, 1], got {self.private_share}.")

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        start = message.adapter
        # Train first, although Algorithm 1 generates first (neither step needs the other). Then all clients
        # of a cohort train in the same batches as under FedAvg, however long each takes to generate.
        private = yield from client.fit(start, round=message.round)
        candidates = yield from synthetic_examples(client, start, message, every=self.every)
        chosen = yield from select(
            candidates,
            private.adapter,
            client.tools.contrast,
            keep=self.keep,
            rule=self.rule,
            drop_unhelpful=self.drop_unhelpful,
        )
        public = yield from fit_anew(client, start, chosen.examples, round=message.round, purpose="public")

        delta = mixed(private.adapter - start, public.adapter - start, self.private_share)
        metrics = {
            "loss": private.loss,
            "steps": private.steps + public.steps,
            "tokens": private.tokens + public.tokens,
            "cross_term": cross_term(private.adapter, public.adapter, self.private_share),
            **chosen.metrics,
            **synthesis_metrics(client, message),
        }
        return answer(self, client, {"delta": delta}, weight=len(client.examples), metrics=metrics)


def mixed(private: AdapterState, public: AdapterState, share: float) -> AdapterState:
    """share * private + (1 - share) * public, factor by factor."""
    # No 1 * x + 0 * y at the ends: it turns -0 into 0, and a diverged y makes everything NaN.
    if share == 1:
        return private
    if share == 0:
        return public
    return share * private + (1 - share) * public


def cross_term(private: AdapterState, public: AdapterState, share: float) -> float:
    """How far the product of mixed factors is from the mix of products, relative to the former.

    The difference is share (1 - share) (B^l - B^s)(A^l - A^s), of second order while both stay close to
    where they started. Frobenius norms over all layers; 0 where the mix is zero.
    """
    both = mixed(private, public, share)
    apart = lora.product_norm(private - public)
    whole = lora.product_norm(both)
    return share * (1 - share) * apart / whole if whole else 0.0
