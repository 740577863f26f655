"""Find in seconds, without weights, whatever would end a run rounds later."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedloom.data.example import Example
from fedloom.errors import ConfigError, DataError, RunError
from fedloom.experiment.build import cohorts, specialist_client, tools
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Skeleton
from fedloom.experiment.settings import Experiment
from fedloom.statistics import evenly
from fedloom.storage import checkpoint

NUMBER = 4  # bytes of an adapter's number on disk


def check(experiment: Experiment, datasets: Sequence[Dataset], base: Skeleton) -> None:
    """Raises ConfigError or DataError where any stage could not work with these data (one set per seed).

    Checked: the base can read and embed every example, every question leaves room for its answer, and every
    algorithm, its synthesis and the cohorts can be built.
    """
    vllm = experiment.machine.vllm
    if vllm is not None and shutil.which(vllm.python) is None:
        raise ConfigError(
            f"machine.vllm.python = {vllm.python!r} cannot be started. "
            "Expected the python of an environment that has vLLM."
        )
    algorithms = experiment.algorithms
    for dataset in datasets:
        select = cohorts(experiment, sorted(dataset.clients))
        for round in range(experiment.rounds):
            select(round)
        for algorithm in algorithms:
            tools(algorithm, experiment, dataset, base.template)
        for label in experiment.compare.local_labels:
            specialist_client(experiment, dataset, label)
    if any("synthesize" in a.needs for a in algorithms) and experiment.prompt.max_length > base.positions:
        raise ConfigError(
            f"Generated examples may have prompt.max_length = {experiment.prompt.max_length} tokens, but the base model "
            f"reads {base.positions}. Set prompt.max_length={base.positions}."
        )
    # Seeds share most of their examples; each is checked once.
    train = dict.fromkeys(e for d in datasets for own in d.clients.values() for e in own)
    held = dict.fromkeys(e for d in datasets for e in d.test)
    questions = dict.fromkeys(e for d in datasets for e in asked(experiment, d))
    relabelled = list(train) if any("relabel" in a.needs for a in algorithms) else []
    check_examples(
        experiment, base, [*train, *(e for e in held if e not in train)], [*questions, *relabelled]
    )


def check_examples(
    experiment: Experiment, base: Skeleton, examples: Iterable[Example], questions: Iterable[Example]
) -> None:
    """Raises DataError for an example the base cannot read, ConfigError for a question without room."""
    _fit(experiment, base, examples)
    _leave_room(experiment, base, questions)


def asked(experiment: Experiment, dataset: Dataset) -> list[Example]:
    """The held-out examples that are answered."""
    return [dataset.test[i] for i in evenly(range(len(dataset.test)), experiment.evaluation.answers)]


def _fit(experiment: Experiment, base: Skeleton, examples: Iterable[Example]) -> None:
    """Check that every example can be trained on and scored."""
    too_long, longest, first = 0, 0, ""
    for example in examples:
        ids = base.template.encode(example).ids
        if len(ids) > base.positions:
            too_long, longest, first = too_long + 1, max(longest, len(ids)), first or _name(example)
        if (largest := max(ids)) >= base.vocabulary:
            raise DataError(
                f"{_name(example)} has token {largest}, but the base model {experiment.model.base!r} embeds {base.vocabulary}: "
                "its tokenizer belongs to another model, or has tokens that were never added to this one."
            )
    if too_long:
        raise DataError(
            f"The base model reads {base.positions} tokens, but {too_long} example{'s have' if too_long > 1 else ' has'} more "
            f"(up to {longest}, first {first}), since prompt.max_length = {experiment.prompt.max_length}. "
            f"Set prompt.max_length={base.positions} to cut longer examples, or choose a base that reads more."
        )


def _leave_room(experiment: Experiment, base: Skeleton, questions: Iterable[Example]) -> None:
    """Check that every question leaves room for an answer of `evaluation.max_new_tokens`."""
    room = experiment.evaluation.max_new_tokens
    for question in questions:
        advice = (
            "Lower evaluation.max_new_tokens, or raise prompt.max_length where the base model reads more."
        )
        try:
            prompt = len(base.template.prompt_ids(question, room=room))
        except DataError as why:
            raise ConfigError(
                f"evaluation.max_new_tokens = {room} leaves no room for the question {_name(question)}: {why} {advice}"
            ) from why
        if prompt + room - 1 > base.positions:  # nothing is predicted from an answer's last token
            raise ConfigError(
                f"The question {_name(question)} has {prompt} tokens; with an answer of evaluation.max_new_tokens = {room} that is "
                f"more than the {base.positions} that the base model reads. Lower evaluation.max_new_tokens, or set "
                f"prompt.max_length={base.positions}."
            )


def _name(example: Example) -> str:
    return example.id or "of a record without id"


def disk(experiment: Experiment, dataset: Dataset, numbers: int, *, compared: bool) -> int:
    """Upper bound, roughly, of the bytes that a run's rounds and adapters take, or a whole comparison's.

    A committed round holds the server's adapter, the form in which it was sent, and up to two states per
    client.
    """
    clients = len(dataset.clients)
    rows = 3 + len(experiment.compare.local) + len(experiment.compare.methods) if compared else 1
    states = checkpoint.KEPT + 1  # one more while it is being written
    remembered = (
        2 * clients
        if compared or not experiment.algorithm.shared or "synthesize" in experiment.algorithm.needs
        else 2
    )
    one_seed = rows * states * (2 + remembered) * numbers * NUMBER
    return (experiment.compare.seeds if compared else 1) * one_seed + 2 * numbers * NUMBER


def check_disk(folder: Path, needed: int) -> None:
    """Raises RunError where the disk of `folder` has less free than that."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"The disk of {there} has {free / 1e6:,.1f} MB free, and this may take {needed / 1e6:,.1f} MB. "
            "Free some space, choose another --out, or a lower adapter.rank."
        )
