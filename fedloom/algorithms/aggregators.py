"""Aggregators: many updates in, one mean of every named state out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from fedloom.errors import EmptyCohort
from fedloom.messages import Update
from fedloom.state import AdapterState


def weighted_mean(updates: Iterable[Update], zero: AdapterState) -> Mapping[str, AdapterState]:
    """Mean of every named state, weighted by `Update.weight`: sum_k n_k x_k / sum_k n_k.

    Updates are folded as they arrive, in float64, and none is kept: memory does not grow with the cohort.
    Another order may change the last bits; the round loop passes updates by client id. Updates of weight 0 do
    not count.

    LoRA's factors are averaged separately, as in FedIT; the product of the means differs from the
    mean of the products by exactly -sum_k p_k (B_k - B)(A_k - A).

    Source: McMahan et al. 2017, Algorithm 1. Raises: EmptyCohort.
    """
    import torch  # here, so that settings load without it

    weight: float = 0
    totals: dict[str, AdapterState] = {}
    like: Mapping[str, AdapterState] = {}
    for update in counted(updates):
        weight += update.weight
        like = like or update.states
        for name, state in update.states.items():
            part = update.weight * state.to(torch.float64)
            totals[name] = totals[name] + part if name in totals else part
    return {
        name: (total / weight).map(lambda t, first: t.to(first.dtype), like[name])
        for name, total in totals.items()
    }


def counted(updates: Iterable[Update]) -> Iterator[Update]:
    """The updates with a positive weight. Raises: EmptyCohort, at the end, if there were none."""
    nobody = True
    for update in updates:
        if update.weight > 0:
            nobody = False
            yield update
    if nobody:
        raise EmptyCohort("no client returned an update with a positive weight")
