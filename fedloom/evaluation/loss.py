"""Held-out loss, mean nats per labelled token: overall, by group, in each client's mix, of the end alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.state import AdapterState
from fedloom.steps import Engine, Score, Scored, Tokens


@dataclass(frozen=True)
class HeldOutLoss:
    loss: float  # nats per labelled token, with equal weight for every token of the held-out set
    groups: Mapping[str, float]  # the same within each category or owner

    def of_mix(self, mix: Mapping[str, float]) -> float | None:
        """Loss in a client's own mix of groups; None if a group has no held-out example."""
        if any(group not in self.groups for group in mix):
            return None
        return sum(share * self.groups[group] for group, share in mix.items())


def held_out_loss(
    engine: Engine, test: Sequence[Any], groups: Sequence[str], adapters: Mapping[Any, AdapterState | None]
) -> dict[Any, HeldOutLoss]:
    """For several adapters in shared batches; None is the untuned base."""
    answers = engine.answer({row: Score(test, adapter) for row, adapter in adapters.items()})
    return {row: _summary(scored, groups) for row, scored in answers.items()}


def end_loss(
    engine: Engine, template: Template, test: Sequence[Example], adapters: Mapping[Any, AdapterState | None]
) -> dict[Any, float]:
    """Mean nats of the token that ends an answer, after the reference; without examples cut before it."""
    ends = [t for t in map(template.encode, test) if t.ids[-1] == template.end]
    only = [Tokens(t.ids, (False,) * (len(t.ids) - 1) + (True,)) for t in ends]
    if not only:
        return {}
    answers = engine.answer({row: Score(only, adapter) for row, adapter in adapters.items()})
    return {row: fmean(one.nll for one in scored) for row, scored in answers.items()}


def _summary(scored: Sequence[Scored], groups: Sequence[str]) -> HeldOutLoss:
    nll: dict[str, float] = defaultdict(float)
    targets: dict[str, int] = defaultdict(int)
    for group, one in zip(groups, scored, strict=True):
        nll[group] += one.nll
        targets[group] += one.targets
    return HeldOutLoss(
        loss=sum(nll.values()) / max(1, sum(targets.values())),
        groups={g: nll[g] / targets[g] for g in sorted(nll) if targets[g]},
    )
