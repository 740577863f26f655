"""Further fields of a round's line in the journal: functions that a training calls after each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.algorithms.base import UNSENT, Algorithm, ServerState
from fedloom.client import Client
from fedloom.evaluation.loss import held_out_loss
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.measure import leaks
from fedloom.experiment.settings import Experiment
from fedloom.experiment.training import Observer
from fedloom.federation import Round
from fedloom.messages import ClientId
from fedloom.statistics import evenly
from fedloom.storage.journal import finite


def unsent_metrics(clients: Mapping[ClientId, Client]) -> Observer:
    """Figures that a simulation's clients keep to themselves; on a network these would stay with them."""

    def observe(state: ServerState, seen: Round) -> Mapping[str, Any]:
        memories = {c: clients[c].memory for c in sorted(seen.updates)}
        return {"unsent": {c: finite(memory[UNSENT]) for c, memory in memories.items() if UNSENT in memory}}

    return observe


def held_out(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    algorithm: Algorithm,
    clients: Mapping[ClientId, Client],
) -> Observer:
    """Held-out loss of the server's adapter, every few rounds and after the last; else None, as where none is shared."""
    test, groups = held_out_part(dataset, experiment.evaluation.examples)

    def observe(state: ServerState, seen: Round) -> Mapping[str, Any]:
        due = not state.round % experiment.evaluation.every or state.round == experiment.rounds
        if not due or not algorithm.shared:
            return {"held_out": None}
        adapter = state.adapter if state.round else None
        found = held_out_loss(machine.engine, test, groups, {"global": adapter})["global"]
        mixes = {c: found.of_mix(dataset.mix(c)) for c in clients if c in dataset.clients}
        return {
            "held_out": {
                **finite({"loss": found.loss}),
                "groups": finite(found.groups),
                "clients": finite(mixes),
            }
        }

    return observe


def leaked(experiment: Experiment, dataset: Dataset, machine: Machine, algorithm: Algorithm) -> Observer:
    """Leakage of the server's adapter, in the rounds where the experiment asks for it."""
    every = experiment.leakage.every

    def observe(state: ServerState, seen: Round) -> Mapping[str, Any]:
        due = every is not None and (not state.round % every or state.round == experiment.rounds)
        if not due or not algorithm.shared:
            return {"leakage": None}
        rows = {"global": state.adapter} if state.round else {}
        found = leaks(experiment, dataset, machine, rows)
        return {"leakage": finite(found["global" if state.round else "base"])}

    return observe


def held_out_part(dataset: Dataset, wanted: int | None) -> tuple[Sequence[Any], list[str]]:
    """The held-out examples used by periodic evaluation: all, or the same few every time."""
    groups = dataset.groups()
    chosen = evenly(range(len(groups)), wanted)
    return [dataset.test[i] for i in chosen], [groups[i] for i in chosen]
