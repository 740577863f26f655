"""The questions to judge, and the answers to them that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.evaluation import questions as question_files
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.judges import judged_by
from fedloom.experiment.settings import ByLikelihood, ByRule, Experiment, Judge
from fedloom.rows import BASE, CENTRALISED, FEDERATED, is_single
from fedloom.statistics import evenly

REFERENCE = "reference"  # an opponent: the questions' own responses


def questions_of(experiment: Experiment, dataset: Dataset) -> tuple[list[Example], int]:
    """The questions to judge, and how many of the file's were left out because a client holds them.

    Raises: FedloomError, before anything is trained, where the judge or the table could not use them.
    """
    settings, path = experiment.judge or Judge(), experiment.evaluation.questions
    left_out = 0
    if path is None:
        questions = list(dataset.test)
    else:
        given = question_files.load(path)
        free = question_files.without(given, (e for own in dataset.clients.values() for e in own))
        questions, left_out = [q.asked for q in free], len(given) - len(free)
        if not questions:
            raise ConfigError(
                f"Every question of {path} is in some client's data. Expected questions that nobody trains on."
            )
    questions = [questions[i] for i in evenly(range(len(questions)), settings.questions)]
    by = judged_by(settings, questions)
    if isinstance(by, ByRule) and (bare := sum(not q.rule for q in questions)):
        raise ConfigError(
            f"{bare} of {len(questions)} questions have no rule, so the rule cannot judge them. "
            'Choose another judge: judge.by = "likelihood", or { kind = "local", model = ... }, or { kind = "endpoint", ... }.'
        )
    if isinstance(by, ByLikelihood) and not any(q.response.strip() for q in questions):
        raise ConfigError(
            "The likelihood judge needs reference answers, and the questions have none. Choose another judge."
        )
    return questions, left_out


def stored_of(experiment: Experiment, questions: Sequence[Example]) -> dict[str, Sequence[str]]:
    """Stored answers: the columns of `evaluation.references`, and the responses if all questions have one."""
    evaluation = experiment.evaluation
    stored: dict[str, Sequence[str]] = {}
    if evaluation.references is not None:
        path = evaluation.references
        names = evaluation.reference_columns or question_files.columns(path, question_files.load(path))
        stored = {name: question_files.answers(path, questions, name) for name in names}
    own = [q.response for q in questions]
    return stored | ({REFERENCE: own} if all(text.strip() for text in own) else {})


def check(experiment: Experiment, dataset: Dataset) -> None:
    """Refuse, before anything is trained, a comparison that could not be judged. Raises: FedloomError."""
    if experiment.judge is None:
        return
    questions, _ = questions_of(experiment, dataset)
    if experiment.judge.table == "wins":
        rows = [BASE, FEDERATED, CENTRALISED, *experiment.compare.methods]
        opponents(experiment.judge, stored_of(experiment, questions), rows)


def opponents(
    settings: Judge, stored: Mapping[str, Any], rows: Sequence[str] | Mapping[str, Any]
) -> list[str]:
    known = [*stored, *(row for row in rows if not is_single(row))]
    if unknown := [name for name in settings.against if name not in known]:
        raise ConfigError(f"judge.against names {unknown[0]!r}. Expected some of {', '.join(known)}.")
    if settings.against:
        return list(settings.against)
    if not stored:
        raise ConfigError(
            "There is nothing to judge against: the questions have no responses of their own. Set evaluation.references, "
            f"or judge.against to some of {', '.join(known)}."
        )
    return [name for name in stored if name != REFERENCE] or [REFERENCE]
