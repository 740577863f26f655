"""Held-out loss, mean nats per labelled token: overall, by group, in each client's mix, of the end alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.evaluation.units import ask
from fedloom.state import AdapterState
from fedloom.steps import Engine, Score, Scored

UNIT = 256  # examples, of all rows together, that are scored at a time


@dataclass(frozen=True)
class HeldOutLoss:
    loss: float  # nats per labelled token, with equal weight for every token of the held-out set
    groups: Mapping[str, float]  # the same within each category or owner
    last: Sequence[float | None]  # nats of each example's last labelled token; None: it has none

    def of_mix(self, mix: Mapping[str, float]) -> float | None:
        """Loss in a client's own mix of groups; None if a group has no held-out example."""
        if any(group not in self.groups for group in mix):
            return None
        return sum(share * self.groups[group] for group, share in mix.items())


def held_out_loss(
    engine: Engine, test: Sequence[Any], groups: Sequence[str], adapters: Mapping[Any, AdapterState | None]
) -> dict[Any, HeldOutLoss]:
    """For several adapters in shared batches; None is the untuned base."""
    scored: dict[Any, list[Scored]] = {row: [] for row in adapters}
    wanted = ask(
        engine, dict.fromkeys(adapters, test), lambda row, part: Score(part, adapters[row]), unit=UNIT
    )
    for row, _, found in wanted:
        scored[row] += found
    return {row: _summary(found, groups) for row, found in scored.items()}


def end_loss(template: Template, test: Sequence[Example], last: Sequence[float | None]) -> float | None:
    """Mean nats of the token that ends an answer, after the reference, from those of each example's last token.

    Over examples that are not cut before it; None if there is none.
    """
    ends = [
        nats
        for e, nats in zip(test, last, strict=True)
        if nats is not None and template.encode(e).ids[-1] == template.end
    ]
    return fmean(ends) if ends else None


def _summary(scored: Sequence[Scored], groups: Sequence[str]) -> HeldOutLoss:
    nll: dict[str, float] = defaultdict(float)
    targets: dict[str, int] = defaultdict(int)
    for group, one in zip(groups, scored, strict=True):
        nll[group] += one.nll
        targets[group] += one.targets
    return HeldOutLoss(
        loss=sum(nll.values()) / max(1, sum(targets.values())),
        groups={g: nll[g] / targets[g] for g in sorted(nll) if targets[g]},
        last=[one.last for one in scored],
    )
