"""FedMIT: FewFedPIT without isolation, its ablation (https://arxiv.org/abs/2403.06131v3, section 4.3).

The synthetic examples are made and selected in the same way, but a single adapter is trained on them
together with the local examples, and uploaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
from fedloom.messages import Broadcast, Update
from fedloom.steps import Steps


@dataclass(frozen=True, kw_only=True)
class FedMIT(Averaging):
    title: ClassVar[str] = "FedMIT"
    paper: ClassVar[str] = "an ablation in arXiv 2403.06131v3"
    needs: ClassVar[frozenset[str]] = frozenset({"synthesize", "contrast"})

    keep: int = 16  # synthetic examples trained on in a round
    rule: Rule = "ifs"
    drop_unhelpful: bool = False
    every: int = 1  # rounds between generations; 0: only once

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        start = message.adapter
        scorer = yield from client.fit(start, round=message.round)
        candidates = yield from synthetic_examples(client, start, message, every=self.every)
        chosen = yield from select(
            candidates,
            scorer.adapter,
            client.tools.contrast,
            keep=self.keep,
            rule=self.rule,
            drop_unhelpful=self.drop_unhelpful,
        )
        together = [*client.examples, *chosen.examples]
        fitted = yield from fit_anew(client, start, together, round=message.round, purpose="mixed")
        metrics = {
            "loss": fitted.loss,
            "steps": scorer.steps + fitted.steps,
            "tokens": scorer.tokens + fitted.tokens,
            **chosen.metrics,
            **synthesis_metrics(client, message),
        }
        return answer(
            self, client, {"delta": fitted.adapter - start}, weight=len(client.examples), metrics=metrics
        )
