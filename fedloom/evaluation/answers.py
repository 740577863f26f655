"""Models' answers to questions, each kept on disk and never generated twice; and their grades.

Metrics are shares in [0, 1]: "rule" is the microworld's own check; "exact" is equality with the reference up
to case, white space and how Unicode writes a letter; "rouge_l" is the F-measure of the longest common
subsequence of words; "ended" says whether the model ended the answer. An answer cut at the limit is neither
right nor exact, whatever it says so far: the model would have continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import folded, rouge_l
from fedloom.evaluation.cache import Cache, key_of
from fedloom.evaluation.units import ask
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate

UNIT = 512  # questions, of all rows together, answered before their answers are stored


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool  # by the model itself; False: cut at the limit


def answers_of(
    engine: Engine,
    template: Template,
    questions: Sequence[Example],
    adapters: Mapping[str, AdapterState | None],
    *,
    weights: str,
    max_new_tokens: int,
    cache: Cache,
) -> dict[str, list[Answer]]:
    """Greedy answers of several adapters; None is the untuned base. `weights` names the base (its sha256).

    Only answers that `cache` lacks are generated, and each is stored as it arrives. An answer of
    `max_new_tokens` tokens counts as cut, even if the end would have come next.
    """
    prompts = [template.prompt_ids(q, room=max_new_tokens) for q in questions]
    keys = {
        row: [
            key_of(
                weights=weights,
                adapter=adapter.sha256() if adapter else None,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                stop=sorted(template.stop),
            )
            for prompt in prompts
        ]
        for row, adapter in adapters.items()
    }
    open_ = {row: [i for i, key in enumerate(keys[row]) if _kept(cache, key) is None] for row in adapters}

    def request(row: str, part: Sequence[int]) -> Generate:
        asked = [prompts[i] for i in part]
        return Generate(asked, adapters[row], max_new_tokens=max_new_tokens, stop=template.stop)

    for row, part, answered in ask(engine, open_, request, unit=UNIT):
        cache.put_all(
            {
                keys[row][i]: {"answer": template.decode(ids), "ended": len(ids) < max_new_tokens}
                for i, ids in zip(part, answered, strict=True)
            }
        )
    return {row: [found for key in keys[row] if (found := _kept(cache, key)) is not None] for row in adapters}


def _kept(cache: Cache, key: str) -> Answer | None:
    """The stored answer; None for one from an older version, which did not record whether it ended."""
    record = cache.get(key)
    return (
        None
        if record is None or "ended" not in record
        else Answer(str(record["answer"]), bool(record["ended"]))
    )


def grade(test: Sequence[Example], answers: Sequence[Answer]) -> dict[str, float]:
    """Mean of every metric that applies to these examples."""
    pairs = list(zip(test, answers, strict=True))
    metrics = {
        "exact": fmean(a.ended and folded(e.response) == folded(a.text) for e, a in pairs),
        "rouge_l": fmean(rouge_l(e.response, a.text) for e, a in pairs),
        "ended": fmean(a.ended for a in answers),
    }
    if all(e.rule for e in test):
        metrics = {"rule": fmean(right(e, a) for e, a in pairs), **metrics}
    return metrics


def right(example: Example, answer: Answer) -> bool:
    """Did the model end this answer, and does it satisfy the example's rule?"""
    return answer.ended and microworld.check(example, answer.text)
