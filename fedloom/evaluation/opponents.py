"""The two sides of a comparison: answers that models give, kept on disk, and answers that are stored already."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from fedloom.data import records
from fedloom.data.example import Example
from fedloom.data.records import Field, Reading, Record
from fedloom.data.template import Template
from fedloom.errors import DataError
from fedloom.evaluation.cache import Cache, key_of
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate

BATCH = 32  # questions answered before their answers are kept


def answers_of(
    engine: Engine,
    template: Template,
    questions: Sequence[Example],
    adapters: Mapping[str, AdapterState | None],
    *,
    weights: str,
    max_new_tokens: int,
    cache: Cache,
) -> dict[str, list[str]]:
    """Greedy answers of several adapters; None is the untuned base. `weights` names the base (its sha256).

    Only what `cache` does not hold is generated, and kept as it comes.
    """
    prompts = [template.prompt_ids(q, room=max_new_tokens) for q in questions]
    keys: dict[Hashable, list[str]] = {
        row: [
            key_of(weights=weights, adapter=adapter.sha256() if adapter else None, prompt=prompt,
                   max_new_tokens=max_new_tokens, stop=sorted(template.stop))
            for prompt in prompts
        ]
        for row, adapter in adapters.items()
    }  # fmt: skip
    for start in range(0, len(questions), BATCH):
        part = range(start, min(start + BATCH, len(questions)))
        open_: dict[Hashable, list[int]] = {row: [i for i in part if cache.get(keys[row][i]) is None] for row in adapters}
        requests: dict[Hashable, Generate] = {
            row: Generate([prompts[i] for i in open_[row]], adapter, max_new_tokens=max_new_tokens, stop=template.stop)
            for row, adapter in adapters.items()
            if open_[row]
        }
        for row, said in (engine.answer(requests) if requests else {}).items():
            for i, ids in zip(open_[row], said, strict=True):
                cache.put(keys[row][i], {"answer": template.decode(ids)})
    return {row: [_kept(cache, key) for key in keys[row]] for row in adapters}


def _kept(cache: Cache, key: str) -> str:
    record = cache.get(key)
    assert record is not None  # put above, or there before
    return str(record["answer"])


def stored_answers(path: Path, questions: Sequence[Example], *, field: str = "answer") -> list[str]:
    """One answer to each question from a file of records with "instruction", perhaps "context", and `field`.

    A question is found by its instruction and context, white space folded. An answer may be blank. Raises
    DataError where a question has none, or two that differ.
    """
    wanted = {"instruction": Field(), "context": Field(required=False, blank=True), field: Field(blank=True)}
    found = records.load(records.read_records(path, wanted), lambda record: _stored(record, field), Reading())
    answers: dict[tuple[str, str], str] = {}
    for question, answer in found:
        if answers.setdefault(question, answer) != answer:
            raise DataError(f"{path} holds two different answers to one question. Expected one for each.")
    absent = [q for q in questions if _question(q.instruction, q.context) not in answers]
    if absent:
        raise DataError(
            f"{path} lacks an answer to {len(absent)} of {len(questions)} questions, first {absent[0].id or 'without id'}. "
            'Expected a record for each, with the same "instruction" and "context" as the question.'
        )
    return [answers[_question(q.instruction, q.context)] for q in questions]


def _stored(record: Record, field: str) -> tuple[tuple[str, str], str]:
    values = record.values
    return _question(str(values["instruction"]), str(values.get("context") or "")), str(values[field])


def _question(instruction: str, context: str) -> tuple[str, str]:
    return " ".join(instruction.split()), " ".join(context.split())
