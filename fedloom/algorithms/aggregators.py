"""Aggregators: many updates in, one mean of every named state out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedloom.errors import EmptyCohort
from fedloom.messages import Update
from fedloom.state import AdapterState


def weighted_mean(updates: Iterable[Update], zero: AdapterState) -> Mapping[str, AdapterState]:
    """Mean of every named state, weighted by `Update.weight`: sum_k n_k x_k / sum_k n_k.

    LoRA's factors are averaged separately, as FedIT does; the product of the means differs from the
    mean of the products by exactly -sum_k p_k (B_k - B)(A_k - A).

    Source: McMahan et al. 2017, Algorithm 1. Raises: EmptyCohort.
    """
    import torch  # here, so that settings are read without waiting for it

    ordered = in_order(updates)
    weight = sum(u.weight for u in ordered)
    means = {}
    for name in ordered[0].states:  # in float64
        total = sum(
            (u.weight * u.states[name].to(torch.float64) for u in ordered[1:]),
            start=ordered[0].weight * ordered[0].states[name].to(torch.float64),
        )
        means[name] = (total / weight).map(lambda t, like: t.to(like.dtype), ordered[0].states[name])
    return means


def in_order(updates: Iterable[Update]) -> list[Update]:
    """Those that weigh anything, by client id. Raises: EmptyCohort.

    Float addition is not associative, and a simulation must repeat to the bit whatever order updates arrive in.
    """
    ordered = sorted((u for u in updates if u.weight > 0), key=lambda u: u.client)
    if not ordered:
        raise EmptyCohort("no client returned an update with a positive weight")
    return ordered
