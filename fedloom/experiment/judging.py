"""A comparison's models judged in pairs: FedIT's table of relative scores, or FedPIT's of wins, ties and losses.

Nothing is trained. Answers are in each seed's answers.jsonl, verdicts in judge/verdicts.jsonl, so that another
judge or another table asks only for what nobody has said yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.data.example import Example
from fedloom.errors import ConfigError, RunError
from fedloom.evaluation import questions as question_files
from fedloom.evaluation.answers import answers_of
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.judge import Judge, compare
from fedloom.evaluation.pairwise import Comparison
from fedloom.evaluation.tables import relative, wins
from fedloom.experiment.comparison import seed_folders, trained, untrained
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.judges import build, how, judged_by, tell_cost
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.settings import ByLikelihood, ByRule, Experiment
from fedloom.experiment.settings import Judge as Settings
from fedloom.experiment.summary import (
    ANSWERS,
    JUDGED,
    SCHEMA,
    evenly,
    is_single,
    is_specialist,
    method_of,
    model_of,
    read_judged,
    read_summary,
    write_json,
)
from fedloom.storage import checkpoint

SAMPLES = 4  # questions kept with everybody's answers, for the report
REFERENCE = "reference"
LEAKS = ("exposure", "extraction", "auc")  # the first that was measured stands beside quality

Ask = Callable[[str], None]  # is told something before it happens


@dataclass(frozen=True)
class Asked:
    """What the models of one seed were asked, and what they and the stored opponents answered."""

    questions: Sequence[Example]
    said: Mapping[str, Sequence[str]]  # row -> answers
    stored: Mapping[str, Sequence[str]]  # column, or "reference" -> answers
    left_out: int  # questions of the file that a client holds


def judge(
    folder: Path, experiment: Experiment, *, agreed: bool = False, say: Ask = lambda _: None
) -> dict[str, Any]:
    """The table that `experiment.judge` asks for, of the finished comparison in `folder`; it is kept in judged.json, too.

    `agreed` lets an endpoint that costs money be asked. Raises: FedloomError, before anything is sent where it is
    for want of consent.
    """
    settings = experiment.judge or Settings()
    seeds = seed_folders(experiment, folder)
    machine = load_machine(experiment)
    with checkpoint.lock(folder):
        asked = [_asked(its, seed, machine, say) for seed, its in seeds.items()]
        the_judge = build(judged_by(settings, asked[0].questions), experiment, machine)
        kept = Cache(folder / "judge" / "verdicts.jsonl")
        pairs = _pairs(settings, asked)
        tell_cost(
            settings,
            the_judge,
            [p.shown for its in pairs.values() for p in its],
            kept,
            agreed=agreed,
            say=say,
        )
        found: dict[tuple[str, str], list[list[Comparison]]] = {}
        for (row, opponent), its in pairs.items():
            say(f"judging {row} against {opponent}")
            by_seed: list[list[Comparison]] = [[] for _ in asked]
            for pair in its:
                by_seed[pair.seed].append(compare(the_judge, *pair.shown, cache=kept, **how(settings)))
            found[row, opponent] = by_seed
        table = _table(settings, the_judge, experiment, asked, found, list(seeds.values()), _leaks(folder))
        _keep(folder, table)
    return table


def _keep(folder: Path, table: Mapping[str, Any]) -> None:
    """Beside those of other judges and forms; one of the same kind is replaced."""

    def kind(t: Mapping[str, Any]) -> Any:
        return t["table"], t["judge"], t["both_orders"], t["questions"]

    others = [t for t in read_judged(folder) if kind(t) != kind(json.loads(json.dumps(table)))]
    write_json(folder / JUDGED, {"schema": SCHEMA, "tables": [*others, table]})


# --- who is asked what -------------------------------------------------------------------------------------


def questions_of(experiment: Experiment, dataset: Dataset) -> tuple[list[Example], int]:
    """The questions that are judged, and how many of the file were left out since a client holds them.

    Raises: FedloomError for what the judge or the table could not use, so that it is known before anything is trained.
    """
    settings, path = experiment.judge or Settings(), experiment.evaluation.questions
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
    """Answers that need no model: the columns of `evaluation.references`, and the questions' own responses where all have one."""
    evaluation = experiment.evaluation
    stored: dict[str, Sequence[str]] = {}
    if evaluation.references is not None:
        path = evaluation.references
        names = evaluation.reference_columns or question_files.columns(path, question_files.load(path))
        stored = {name: question_files.answers(path, questions, name) for name in names}
    own = [q.response for q in questions]
    return stored | ({REFERENCE: own} if all(text.strip() for text in own) else {})


def check(experiment: Experiment, dataset: Dataset) -> None:
    """Refuse, before anything is trained, what could not be judged afterwards. Raises: FedloomError."""
    if experiment.judge is None:
        return
    questions, _ = questions_of(experiment, dataset)
    if experiment.judge.table == "wins":
        rows = ["base", "federated", "centralised", *experiment.compare.methods]
        _opponents(experiment.judge, stored_of(experiment, questions), rows)


def _asked(experiment: Experiment, folder: Path, machine: Machine, say: Ask) -> Asked:
    say(f"answers of {folder.name}")
    dataset = load_data(experiment)
    questions, left_out = questions_of(experiment, dataset)
    if missing := untrained(experiment, folder):
        raise RunError(
            f"{folder} holds no finished training of {', '.join(missing)}, and judging trains nothing. "
            f"Train first: fedloom compare --resume --out {folder.parent}"
        )
    rows, _ = trained(experiment, dataset, machine, folder)
    if experiment.judge is None or experiment.judge.table == "relative":
        rows = {row: adapter for row, adapter in rows.items() if not is_single(row)}
    said = answers_of(
        machine.engine,
        machine.template,
        questions,
        rows,
        weights=machine.base_hash,
        max_new_tokens=experiment.evaluation.max_new_tokens,
        cache=Cache(folder / ANSWERS),
    )
    return Asked(
        questions,
        {row: [a.text for a in its] for row, its in said.items()},
        stored_of(experiment, questions),
        left_out,
    )


@dataclass(frozen=True)
class _Pair:
    seed: int  # index
    shown: tuple[Sequence[Example], Sequence[str], Sequence[str]]  # questions, ours, theirs


def _pairs(settings: Settings, asked: Sequence[Asked]) -> dict[tuple[str, str], list[_Pair]]:
    """(row, opponent) -> what is to be compared: one pair a seed, or one for each client's own model."""
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for s, its in enumerate(asked):
        if settings.table == "relative":
            against = {"federated": its.said["federated"]}
        else:
            against = {
                name: its.stored.get(name) or its.said[name]
                for name in _opponents(settings, its.stored, its.said)
            }
        for row, ours in its.said.items():
            label = f"{row.partition(':')[0]} mean" if is_single(row) else row
            for opponent, theirs in against.items():
                if label != opponent:
                    pairs.setdefault((label, opponent), []).append(_Pair(s, (its.questions, ours, theirs)))
    return pairs


def _opponents(
    settings: Settings, stored: Mapping[str, Any], rows: Sequence[str] | Mapping[str, Any]
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


# --- the table ---------------------------------------------------------------------------------------------


def task_of(row: str, experiment: Experiment) -> str:
    """What FedIT's table calls the task of a row: the instructions it was tuned on."""
    if row == "base":
        return "none"
    if is_specialist(row):
        return ", ".join(experiment.compare.local[experiment.compare.local_labels.index(row)])
    return "one client's" if model_of(row) == "personal" else "everybody's"


def _table(
    settings: Settings,
    the_judge: Judge,
    experiment: Experiment,
    asked: Sequence[Asked],
    found: Mapping[tuple[str, str], Sequence[Sequence[Comparison]]],
    seeds: Sequence[Experiment],
    leaks: Mapping[str, Any],
) -> dict[str, Any]:
    categories = [[q.category for q in its.questions] for its in asked]
    crossed = all(
        [question_files.key(q) for q in its.questions] == [question_files.key(q) for q in asked[0].questions]
        for its in asked
    )
    rows = []
    for (row, opponent), by_seed in found.items():
        every = [c for its in by_seed for c in its]
        made: dict[str, Any]
        if settings.table == "relative":
            made = asdict(
                relative(
                    [c for [c] in by_seed], categories, divides=the_judge.rubric.low >= 0, crossed=crossed
                )
            )
        else:
            counted = wins(by_seed, categories)
            made = {"win": None} if counted is None else asdict(counted)
        rows.append(
            {
                "row": row,
                "opponent": opponent,
                "model": model_of(row),
                "method": method_of(row, experiment),
                "task": task_of(row, experiment),
                "private_share": _private_share(row, experiment),
                "leakage": leaks.get(row),
                **made,
                "judged": sum(c.judged for c in every),
                "of": sum(c.questions for c in every),
                **_orders(every),
            }
        )
    return {
        "table": settings.table,
        "judge": {name: value for name, value in the_judge.identity.items() if name != "prompt"},
        "rubric": the_judge.rubric.name,
        "both_orders": settings.both_orders,
        "questions": {
            "from": "held-out examples"
            if experiment.evaluation.questions is None
            else Path(experiment.evaluation.questions).name,
            "count": len(asked[0].questions),
            "left_out": max(its.left_out for its in asked),
            "same_for_every_seed": crossed,
        },
        "seeds": [e.seed for e in seeds],
        "rows": rows,
        "samples": _samples(asked[0], found),
    }


def _leaks(folder: Path) -> dict[str, dict[str, Any]]:
    """What the models that others see give away, as the comparison measured it: row -> the first of its metrics of leakage."""
    leaks: dict[str, dict[str, Any]] = {}
    for name in LEAKS:
        for entry in (read_summary(folder) or {"rows": []})["rows"]:
            if entry["metric"] == name:
                leaks.setdefault(entry["row"], {k: entry[k] for k in ("metric", "mean", "ci95")})
    return leaks


def _private_share(row: str, experiment: Experiment) -> float | None:
    """beta of FewFedPIT; None of other rows."""
    chosen = experiment.algorithm if row == "federated" else experiment.compare.methods.get(row)
    return chosen.private_share if isinstance(chosen, FewFedPIT) else None


def _orders(every: Sequence[Comparison]) -> dict[str, Any]:
    """Disagreement of the two orders and the liking for the first place, over all questions and seeds; None of one order."""
    pairs = [p for c in every for p in c.pairs]
    agree = [p.orders_agree for p in pairs if p.orders_agree is not None]
    bias = [p.position_bias for p in pairs if p.position_bias is not None]
    return {
        "order_disagreement": 1 - sum(agree) / len(agree) if agree else None,
        "position_bias": sum(bias) / len(bias) if bias else None,
    }


def _samples(
    asked: Asked, found: Mapping[tuple[str, str], Sequence[Sequence[Comparison]]]
) -> list[dict[str, Any]]:
    """A few questions of the first seed, with every answer that was judged and its score."""
    chosen = sorted({i * len(asked.questions) // SAMPLES for i in range(min(SAMPLES, len(asked.questions)))})
    samples = []
    for i in chosen:
        scores: dict[str, float] = {}
        for (row, opponent), by_seed in found.items():
            for pair in (p for c in by_seed[0][:1] for p in c.pairs if p.question == i):
                scores |= {row: pair.ours, opponent: pair.theirs}
        texts = {**{r: a for r, a in asked.said.items() if not is_single(r)}, **asked.stored}
        question = asked.questions[i]
        samples.append(
            {
                "category": question.category,
                "instruction": question.instruction,
                "context": question.context,
                "answers": [
                    {"of": name, "text": texts[name][i], "score": score}
                    for name, score in scores.items()
                    if name in texts
                ],
            }
        )
    return samples
