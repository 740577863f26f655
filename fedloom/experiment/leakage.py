"""What shared models give away, in three numbers a model: for comparisons, and for curves over rounds.

`extraction`: ROUGE-L between trained responses and what a model answers to their prompts, FedPIT's measure.
`auc`: how well training examples are told from held-out ones (0.5: not at all). `exposure`: bits known of a
planted canary (1.44 on average where it was never seen). All need the training data: a simulation has them,
a real server has not. `fedloom audit` measures more, with intervals and controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.attacks.exposure import Pool, exposures
from fedloom.attacks.extraction import draw, extract
from fedloom.attacks.measures import BASE, with_base
from fedloom.attacks.membership import membership
from fedloom.data.canaries import copies
from fedloom.data.example import Example
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.settings import Experiment
from fedloom.state import AdapterState


@dataclass(frozen=True)
class Targets:
    """What an attack is mounted on, the same for every model of a seed."""

    members: Sequence[Example]  # drawn evenly over the clients; no secrets among them
    held_out: Sequence[Example]
    canaries: Mapping[Example, int] = field(default_factory=dict)  # planted secrets, and their copies
    twins: Sequence[Example] = ()  # as many that were not planted
    references: Sequence[Example] = ()  # what either is ranked among


def targets(experiment: Experiment, dataset: Dataset) -> Targets:
    seed, data, wanted = experiment.seed, experiment.data, experiment.audit
    plain = {c: [e for e in own if not e.private] for c, own in dataset.clients.items()}
    members = draw({c: own for c, own in plain.items() if own}, wanted.examples, seed=seed)
    held = draw({"": dataset.test}, wanted.examples, seed=seed)
    if data.canaries is None:
        return Targets(members, held)
    planted: dict[Example, int] = {}
    for own in dataset.clients.values():
        planted |= copies(own)
    twins = data.canaries.held_out(len(planted), seed=seed)
    return Targets(members, held, planted, twins, data.canaries.references(wanted.references, seed=seed))


def leakage(
    experiment: Experiment, dataset: Dataset, machine: Machine, rows: Mapping[str, AdapterState | None]
) -> dict[str, dict[str, float]]:
    """Every metric of every row and of the untuned base, `exposure` only where canaries were planted.

    Losses are compared with the base's, so that what is easy anyway does not pass for leaked; the base
    itself is measured by its loss alone.
    """
    on, engine = targets(experiment, dataset), machine.engine
    tuned = {row: adapter for row, adapter in rows.items() if row != BASE}
    every = with_base(tuned)
    said = extract(
        engine,
        machine.template,
        tuned,
        on.members,
        on.held_out,
        max_new_tokens=experiment.evaluation.max_new_tokens,
    )
    told = membership(engine, on.members, on.held_out, every)
    found = {
        row: {
            "extraction": said[row].members.rouge_l.mean,
            "auc": told[row]["loss" if row == BASE else "reference"].auc,
        }
        for row in every
    }
    if on.canaries:
        known = exposures(engine, [Pool(list(on.canaries), on.twins, on.references)], every)
        for row in every:
            mean = known[row]["loss" if row == BASE else "calibrated"].planted.mean
            assert mean is not None  # there are canaries
            found[row]["exposure"] = mean
    return found
