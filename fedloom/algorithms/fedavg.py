"""FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

On LoRA adapters, weighted by the number of examples, this is FedIT (Zhang et al. 2023,
https://arxiv.org/abs/2305.05644). With one client that owns everything it is centralised tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.algorithms.averaging import Averaging
from fedloom.algorithms.base import answer
from fedloom.client import Client
from fedloom.messages import Broadcast, Update
from fedloom.steps import Steps


@dataclass(frozen=True, kw_only=True)
class FedAvg(Averaging):
    title: ClassVar[str] = "FedIT"
    paper: ClassVar[str] = "arXiv 2305.05644"

    def client(self, message: Broadcast, client: Client) -> Steps[Update]:
        fitted = yield from client.fit(message.adapter, round=message.round)
        delta = fitted.adapter - message.adapter
        metrics = {"loss": fitted.loss, "steps": fitted.steps, "tokens": fitted.tokens}
        return answer(self, client, {"delta": delta}, weight=len(client.examples), metrics=metrics)
