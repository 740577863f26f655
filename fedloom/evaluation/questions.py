"""Questions that no client holds, from a file, and stored answers to them.

A record is one question in the shape of Dolly or Alpaca, of Vicuna and MT-Bench (the first of its `turns` is
asked), or of Self-Instruct (the first of its `instances` is taken). Any other text in it that is not a label
is someone's answer: MedInstruct-test has four such columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data import records
from fedloom.data.example import Example
from fedloom.data.records import BadRecord, Field, Reading, Record
from fedloom.errors import DataError

# Ours -> its names in published files; the first that a record has is used.
NAMES = {
    "instruction": ("instruction", "question", "prompt", "text", "turns"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer", "reference"),
}
# Every field may have any form; _question() examines it.
FIELDS = {
    name: Field(required=False, nested=True)
    for name in (*(n for names in NAMES.values() for n in names), "instances")
}
LABELS = frozenset(
    {
        "id",
        "question_id",
        "category",
        "topic",
        "type",
        "view",
        "difficulty",
        "rule",
        "owner",
        "source",
        "motivation_app",
        "turns",
        "instances",
    }
)


@dataclass(frozen=True)
class Question:
    asked: Example  # its response is the file's own reference, "" if it has none
    texts: Mapping[str, str]  # every field that is text


def load(path: str | Path) -> list[Question]:
    """Every question of the file, in order, read strictly. Raises DataError if one has no instruction."""
    path = Path(path)
    return list(
        records.load(map(_checked, records.read_records(path, FIELDS, name=path.name)), _question, Reading())
    )


def without(questions: Sequence[Question], held: Iterable[Example]) -> list[Question]:
    """The questions that are not in `held`, ignoring white space and case."""
    known = {key(e) for e in held}
    return [q for q in questions if key(q.asked) not in known]


def key(question: Example) -> tuple[str, str]:
    return " ".join(question.instruction.casefold().split()), " ".join(question.context.casefold().split())


def columns(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """The fields that hold an answer in every record: text that is neither question nor label.

    Raises DataError if there are none.
    """
    asked = {name for ours in ("instruction", "context") for name in NAMES[ours]}
    found = [
        name
        for name in questions[0].texts
        if name not in asked | LABELS and all(name in q.texts for q in questions)
    ]
    if not found:
        names = ", ".join(questions[0].texts)
        raise DataError(
            f"{path} holds no stored answers: none of its fields ({names}) is an answer. Name them: evaluation.reference_columns."
        )
    return found


def answers(path: str | Path, questions: Sequence[Example], field: str) -> list[str]:
    """The answer stored under `field` for each question, found by instruction and context. It may be blank.

    Raises DataError if a question has none, or two that differ.
    """
    stored = load(path)
    if absent := [q for q in stored if field not in q.texts]:
        raise DataError(
            f"{path}: {len(absent)} of {len(stored)} records have no text under {field!r}; they have {', '.join(absent[0].texts)}."
        )
    said: dict[tuple[str, str], str] = {}
    for q in stored:
        if said.setdefault(key(q.asked), q.texts[field]) != q.texts[field]:
            raise DataError(f"{path} holds two different answers to one question. Expected one for each.")
    if lacking := [q for q in questions if key(q) not in said]:
        raise DataError(
            f"{path} lacks an answer to {len(lacking)} of {len(questions)} questions, first {lacking[0].id or 'without id'}. "
            'Expected a record for each, with the same "instruction" and "context" as the question.'
        )
    return [said[key(q)] for q in questions]


def _checked(record: Record | BadRecord) -> Record | BadRecord:
    if isinstance(record, BadRecord) or _first(record.values, "instruction").strip():
        return record
    names = ", ".join(map(str, record.values))
    return BadRecord(
        record.place,
        "missing",
        f"no question under {', '.join(NAMES['instruction'])}; its fields are {names}",
        b"",
        0,
    )


def _question(record: Record) -> Question:
    values = record.values
    instances = values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        values = {**values, **instances[0]}

    def text(name: str) -> str:
        return str(values[name]) if isinstance(values.get(name), str | int) else ""

    asked = Example(
        instruction=_first(values, "instruction"),
        response=_first(values, "response"),
        context=_first(values, "context"),
        category=text("category"),
        id=text("question_id") or text("id") or str(record.place),
        rule=text("rule"),
    )
    return Question(asked, {name: value for name, value in values.items() if isinstance(value, str)})


def _first(values: Mapping[str, Any], ours: str) -> str:
    for name in NAMES[ours]:
        value = values.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return ""
