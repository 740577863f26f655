"""From settings to algorithms and clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.experiment.datasets import MICROWORLD, Dataset
from fedloom.experiment.machine import CONTEXT_LENGTH, Machine, Skeleton
from fedloom.experiment.settings import PARTS, Choice, Experiment
from fedloom.messages import ClientId
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.pseudo_labels import PseudoLabels

if TYPE_CHECKING:  # settings and data are read without waiting for torch
    pass


def build_algorithm(
    chosen: Choice, experiment: Experiment, dataset: Dataset, machine: Machine | Skeleton
) -> Algorithm:
    """An algorithm with the parts it needs, which are made from the experiment's other sections."""
    template = machine.template
    parts: Mapping[str, Callable[[], Any]] = {
        "synthesize": lambda: _synthesizer(experiment, dataset, machine),
        "contrast": lambda: template.contrast,
        "relabel": lambda: PseudoLabels(
            prompt=lambda e: template.prompt_ids(e, room=experiment.evaluation.max_new_tokens),
            decode=template.decode,
            stop=template.stop,
            response_tokens=experiment.evaluation.max_new_tokens,
        ),
    }
    built: Algorithm = chosen.build(**{name: parts[name]() for name in PARTS if chosen.takes(name)})
    return built


def _synthesizer(experiment: Experiment, dataset: Dataset, machine: Machine | Skeleton) -> Any:
    chosen, seed = experiment.synthesis, experiment.seed
    if chosen.make is FromPool:
        pool = dataset.spare if chosen.name == "spare" else _restyled(experiment, dataset)
        if not pool:
            raise ConfigError(
                f'synthesis.kind = "{chosen.name}" trains on examples that nobody holds, and there are none: '
                "set data.pool, so that some are left over."
            )
        return chosen.build(pool=pool, seed=seed)
    if any(e.turns for own in dataset.clients.values() for e in own):
        raise ConfigError(
            f'synthesis.kind = "{chosen.name}" writes single questions, and these data are conversations, whose last question '
            'makes no sense alone. Choose an algorithm without synthesis, or synthesis.kind = "spare".'
        )
    tokenizer = machine.tokenizer
    return chosen.build(
        encode=machine.template.document_ids,
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        stop=machine.template.stop,
        seed=seed,
        context_length=min(machine.positions, CONTEXT_LENGTH),
    )


def _restyled(experiment: Experiment, dataset: Dataset) -> list[Example]:
    """The spare examples with right answers in another style than the federation's."""
    if experiment.data.source != "microworld":
        raise ConfigError('synthesis.kind = "restyled" exists only for data.source = "microworld".')
    other = microworld.corpus(examples=experiment.data.examples or MICROWORLD, seed=experiment.seed, style=1)
    wanted = {e.id for e in dataset.spare}
    return [e for e in other if e.id in wanted]


def federated_clients(experiment: Experiment, dataset: Dataset) -> dict[ClientId, Client]:
    return {c: client_of(experiment, c, examples) for c, examples in dataset.clients.items()}


def client_of(experiment: Experiment, name: ClientId, examples: Sequence[Example]) -> Client:
    limit = _limit(experiment, len(examples))
    return Client(name, examples, limit=limit, local=experiment.local, seed=experiment.seed)


def specialist_client(experiment: Experiment, dataset: Dataset, label: str) -> Client:
    """The owner of all training examples in the categories that `compare.local` has for this label. Raises ConfigError."""
    categories = experiment.compare.local[experiment.compare.local_labels.index(label)]
    everything = [e for examples in dataset.clients.values() for e in examples]
    known = sorted({e.category for e in everything} - {""})
    if unknown := [c for c in categories if c not in known]:
        raise ConfigError(
            f"compare.local names the category {unknown[0]!r}, which no training example has. "
            + (
                f"Expected some of {', '.join(known)}."
                if known
                else "The examples have no categories; data.clusters makes some."
            )
        )
    return client_of(experiment, label, [e for e in everything if e.category in categories])


def pooled_client(experiment: Experiment, dataset: Dataset, cohort_size: float) -> dict[ClientId, Client]:
    """Centralised tuning: one client that holds what all of them hold.

    Budget "epochs": in a round it trains on as many examples as the whole cohort does together. Budget
    "steps": on as many as one client does on average, or on more, so that it takes as many optimizer steps.
    """
    local = experiment.local
    everything = [e for examples in dataset.clients.values() for e in examples]
    sizes = [len(examples) for examples in dataset.clients.values()]
    counts = [
        _limit(experiment, n) or local.epochs * n for n in sizes
    ]  # examples that each client takes in a round
    share = cohort_size if experiment.compare.budget == "epochs" else 1.0
    limit = max(1, round(float(np.mean(counts)) * share))
    if experiment.compare.budget == "steps":  # clients with few examples take more steps on as many
        steps = round(
            float(np.mean([local.steps_of(n, count) for n, count in zip(sizes, counts, strict=True)]))
        )
        while local.steps_of(len(everything), limit) < steps:
            limit += 1
    pooled = Client("centralised", everything, limit=limit, local=local, seed=experiment.seed)
    return {pooled.id: pooled}


def _limit(experiment: Experiment, size: int) -> int | None:
    cap = experiment.examples_per_round
    return None if cap is None else min(cap, experiment.local.epochs * size)
