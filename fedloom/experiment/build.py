"""From settings to the parts of a training: cohorts, clients, and the tools of their sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client, Synthesizer, Tools
from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.errors import ConfigError
from fedloom.experiment.datasets import MICROWORLD, Dataset
from fedloom.experiment.settings import SYNTHESIS, Experiment
from fedloom.messages import ClientId
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.pseudo_labels import PseudoLabels
from fedloom.synthesis.self_instruct import SelfInstruct


def cohorts(experiment: Experiment, clients: Sequence[ClientId]) -> Callable[[int], list[ClientId]]:
    """Round -> who takes part in it."""
    return partial(experiment.cohort, sorted(clients), experiment.seed)


def tools(algorithm: Algorithm, experiment: Experiment, dataset: Dataset, words: Template) -> Tools:
    """The tools that a client's site lends this algorithm. Raises: ConfigError where the data lack them."""
    lent = Tools(
        words,
        contrast=words.contrast,
        relabel=PseudoLabels(response_tokens=experiment.evaluation.max_new_tokens),
    )
    if "synthesize" in algorithm.needs:
        lent = replace(lent, synthesize=_synthesizer(experiment, dataset, words))
    return lent


def _synthesizer(experiment: Experiment, dataset: Dataset, words: Template) -> Synthesizer:
    chosen = experiment.synthesis
    kind = SYNTHESIS.name(chosen)
    if not isinstance(chosen, SelfInstruct):
        pool = dataset.spare if kind == "held_back" else _other_style(experiment, dataset)
        if not pool:
            raise ConfigError(
                f'synthesis.kind = "{kind}" trains on examples that nobody holds, and there are none: '
                "set data.pool, so that some are left over."
            )
        return FromPool(pool=pool, candidates=chosen.candidates)
    if any(e.turns for own in dataset.clients.values() for e in own):
        raise ConfigError(
            f'synthesis.kind = "{kind}" writes single questions, and these data are conversations, whose last question '
            'makes no sense alone. Choose an algorithm without synthesis, or synthesis.kind = "held_back".'
        )
    chosen.check(words)
    return chosen


def _other_style(experiment: Experiment, dataset: Dataset) -> list[Example]:
    """The examples that nobody holds, answered correctly but in a different style from the federation's."""
    if experiment.data.source != "microworld":
        raise ConfigError('synthesis.kind = "other_style" exists only for data.source = "microworld".')
    other = microworld.corpus(examples=experiment.data.examples or MICROWORLD, seed=experiment.seed, style=1)
    wanted = {e.id for e in dataset.spare}
    return [e for e in other if e.id in wanted]


def federated_clients(experiment: Experiment, dataset: Dataset, lent: Tools) -> dict[ClientId, Client]:
    return {c: client_of(experiment, c, examples, lent) for c, examples in dataset.clients.items()}


def client_of(
    experiment: Experiment, name: ClientId, examples: Sequence[Example], lent: Tools = Tools()
) -> Client:
    limit = _limit(experiment, len(examples))
    return Client(name, examples, limit=limit, local=experiment.local, seed=experiment.seed, tools=lent)


def specialist_client(experiment: Experiment, dataset: Dataset, label: str) -> Client:
    """The owner of all training examples in this label's categories (`compare.local`). Raises ConfigError."""
    categories = experiment.compare.local[experiment.compare.local_labels.index(label)]
    everything = [e for examples in dataset.clients.values() for e in examples]
    known = sorted({e.category for e in everything} - {""})
    if unknown := [c for c in categories if c not in known]:
        raise ConfigError(
            f"compare.local names the category {unknown[0]!r}, which no training example has. "
            + (
                f"Expected some of {', '.join(known)}."
                if known
                else "The examples have no categories; data.clusters can make some."
            )
        )
    return client_of(experiment, label, [e for e in everything if e.category in categories])


def pooled_client(experiment: Experiment, dataset: Dataset, cohort_size: float) -> dict[ClientId, Client]:
    """Centralised tuning: one client that holds all clients' examples.

    Budget "epochs": each round it trains on as many examples as the whole cohort together. Budget
    "steps": on at least as many as the average client, and enough to take as many optimizer steps.
    """
    local = experiment.local
    everything = [e for examples in dataset.clients.values() for e in examples]
    sizes = [len(examples) for examples in dataset.clients.values()]
    counts = [
        _limit(experiment, n) or local.epochs * n for n in sizes
    ]  # examples each client trains on in a round
    share = cohort_size if experiment.compare.budget == "epochs" else 1.0
    limit = max(1, round(float(np.mean(counts)) * share))
    if experiment.compare.budget == "steps":  # small clients take more steps over the same number of examples
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
