"""Answers that models give to questions, each kept on the disk and never generated twice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.evaluation.cache import Cache, key_of
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate

BATCH = 128  # questions answered before their answers are kept


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
    prompts = [template.prompt_ids(q.instruction, q.context, room=max_new_tokens) for q in questions]
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
        answered = engine.answer(requests) if requests else {}
        cache.put_all({
            keys[row][i]: {"answer": template.decode(ids)} for row, said in answered.items() for i, ids in zip(open_[row], said, strict=True)
        })  # fmt: skip
    return {row: [_kept(cache, key) for key in keys[row]] for row in adapters}


def _kept(cache: Cache, key: str) -> str:
    record = cache.get(key)
    assert record is not None  # put above, or there before
    return str(record["answer"])
