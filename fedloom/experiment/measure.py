"""Measure rows: every model on the same held-out questions, and what the shared ones give away."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.attacks.leakage import leakage
from fedloom.attacks.targets import Targets, targets
from fedloom.errors import RunError
from fedloom.evaluation.answers import answers_of, grade, right
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.loss import end_loss, held_out_loss
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.settings import Experiment
from fedloom.rows import Row
from fedloom.state import AdapterState
from fedloom.statistics import evenly

SAMPLES = 16  # held-out questions kept with everybody's answers, for the report


def measure(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    rows: Mapping[str, AdapterState | None],
    given_away: Mapping[str, Mapping[str, float]] = {},
    *,
    cache: Cache,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every row on the same held-out examples: metrics, overall and by group, and a few answers.

    `given_away` holds the metrics of leakage of those rows that have any. Answers are kept in `cache`; `say` hears
    what begins. Raises RunError for a row that has diverged.
    """
    groups = dataset.groups()
    say("measuring held-out loss")
    losses = held_out_loss(machine.engine, dataset.test, groups, rows)
    if diverged := [row for row in rows if not math.isfinite(losses[row].loss)]:
        raise RunError(
            f"The held-out loss of {diverged[0]!r} is no finite number: its training diverged. "
            "Start anew with a lower local.learning_rate."
        )
    asked = evenly(range(len(dataset.test)), experiment.evaluation.answers)
    questions = [dataset.test[i] for i in asked]
    limit = experiment.evaluation.max_new_tokens
    say(f"answering {len(asked)} question{'s' if len(asked) != 1 else ''} by {len(rows)} models")
    said = (
        answers_of(
            machine.engine,
            machine.template,
            questions,
            rows,
            weights=machine.base_hash,
            max_new_tokens=limit,
            cache=cache,
        )
        if asked
        else {}
    )
    cut = sum(machine.template.prompt_cut(q, room=limit) != "none" for q in questions)
    measured: dict[str, Any] = {}
    for row in rows:
        overall = {"loss": losses[row].loss}
        end = end_loss(machine.template, questions, [losses[row].last[i] for i in asked])
        if end is not None:
            overall["end_loss"] = end
        within: dict[str, dict[str, float]] = {g: {"loss": loss} for g, loss in losses[row].groups.items()}
        if asked:
            overall |= grade(questions, said[row])
        for group in within:
            part = [j for j, i in enumerate(asked) if groups[i] == group]
            if part:
                within[group] |= grade([questions[j] for j in part], [said[row][j] for j in part])
        measured[row] = {"metrics": {**overall, **given_away.get(row, {})}, "groups": within}
    samples = [
        {
            "group": groups[asked[j]],
            "instruction": questions[j].instruction,
            "context": questions[j].context,
            "reference": questions[j].response,
            "answers": {row: said[row][j].text for row in rows},
            "right": {row: right(questions[j], said[row][j]) for row in rows} if questions[j].rule else None,
        }
        for j in evenly(range(len(asked)), SAMPLES)
    ]
    return {
        "seed": experiment.seed,
        "rows": measured,
        "samples": samples,
        "prompts_cut": cut,
        "mix": {c.client: dict(c.counts) for c in dataset.table.clients},
        "answered": dict(Counter(groups[i] for i in asked)),
    }


def targets_of(experiment: Experiment, dataset: Dataset) -> Targets:
    """What attacks on this experiment's models look for."""
    audit = experiment.audit
    return targets(
        dataset.clients,
        dataset.test,
        experiment.data.canaries,
        examples=audit.examples,
        references=audit.references,
        seed=experiment.seed,
    )


def leaks(
    experiment: Experiment, dataset: Dataset, machine: Machine, rows: Mapping[str, AdapterState | None]
) -> dict[str, dict[str, float]]:
    """Every metric of leakage of every row and of the untuned base."""
    return leakage(
        machine.engine,
        machine.template,
        targets_of(experiment, dataset),
        rows,
        max_new_tokens=experiment.evaluation.max_new_tokens,
    )


def shared(rows: Mapping[str, AdapterState | None]) -> dict[str, AdapterState | None]:
    """Without the models of single owners, which nobody else ever sees."""
    return {row: adapter for row, adapter in rows.items() if Row.parse(row).of != "personal"}
