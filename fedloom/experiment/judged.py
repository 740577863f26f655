"""The table that results from judging a comparison, as judged.json holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.data.example import Example
from fedloom.evaluation import questions as question_files
from fedloom.evaluation.judge import Judge
from fedloom.evaluation.metrics import LEAKS
from fedloom.evaluation.pairwise import Comparison
from fedloom.evaluation.tables import relative, wins
from fedloom.experiment.settings import Experiment
from fedloom.experiment.settings import Judge as Settings
from fedloom.experiment.summary import method_of
from fedloom.rows import BASE, FEDERATED, Row, is_single
from fedloom.statistics import evenly
from fedloom.storage.files import read_summary

SAMPLES = 4  # questions kept with everybody's answers, for the report


@dataclass(frozen=True)
class Asked:
    """The questions put to one seed's models, with their answers and those of stored opponents."""

    questions: Sequence[Example]
    said: Mapping[str, Sequence[str]]  # row -> answers
    stored: Mapping[str, Sequence[str]]  # column, or "reference" -> answers
    left_out: int  # questions of the file that a client holds


def task_of(row: Row, experiment: Experiment) -> str:
    """The kinds of instructions a row was tuned on; FedIT's table calls them its task."""
    if row.of == BASE:
        return "none"
    if row.specialist:
        return ", ".join(experiment.compare.local[experiment.compare.local_labels.index(row.label)])
    return "one client's" if row.of == "personal" else "everybody's"


def table(
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
                "model": Row.parse(row).of,
                "method": method_of(Row.parse(row), experiment),
                "task": task_of(Row.parse(row), experiment),
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
        "judge": named(the_judge),
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


def named(the_judge: Judge) -> dict[str, Any]:
    """The judge's identity, without the wording of its prompt."""
    return {name: value for name, value in the_judge.identity.items() if name != "prompt"}


def leaks(folder: Path) -> dict[str, dict[str, Any]]:
    """How much each model that others see leaks, as the comparison measured it: row -> first such metric."""
    found: dict[str, dict[str, Any]] = {}
    for name in LEAKS:
        for entry in (read_summary(folder) or {"rows": []})["rows"]:
            if entry["metric"] == name:
                found.setdefault(entry["row"], {k: entry[k] for k in ("metric", "mean", "ci95")})
    return found


def _private_share(row: str, experiment: Experiment) -> float | None:
    """FewFedPIT's beta; None for other rows."""
    chosen = experiment.algorithm if row == FEDERATED else experiment.compare.methods.get(row)
    return chosen.private_share if isinstance(chosen, FewFedPIT) else None


def _orders(every: Sequence[Comparison]) -> dict[str, Any]:
    """Disagreement of the two orders and position bias, over all questions and seeds; None with one order."""
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
    """A few of the first seed's questions, with every judged answer and its score."""
    chosen = evenly(range(len(asked.questions)), SAMPLES)
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
