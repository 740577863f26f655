"""What a model answers to held-out instructions, and how right that is.

Metrics are shares in [0, 1]: "rule" is the microworld's own check, "exact" equality with the reference
but for case, white space and how Unicode writes a letter, "rouge_l" the F-measure of the longest common subsequence of
words, "ended" whether the model ended the answer. One that was cut at the limit is neither right nor exact, whatever it
says so far: the model would have gone on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import folded, rouge_l
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool  # by the model itself; else it was cut at the limit


def answer(
    engine: Engine,
    template: Template,
    test: Sequence[Example],
    adapters: Mapping[Any, AdapterState | None],
    *,
    max_new_tokens: int,
) -> dict[Any, list[Answer]]:
    """Greedy answers of several adapters in shared batches; None is the untuned base.

    An answer of `max_new_tokens` tokens is cut by definition, even if the end would have come next.
    """
    prompts = [template.prompt_ids(e.instruction, e.context, room=max_new_tokens) for e in test]
    requests = {
        row: Generate(prompts, adapter, max_new_tokens=max_new_tokens, stop=template.stop)
        for row, adapter in adapters.items()
    }
    return {
        row: [Answer(template.decode(ids), len(ids) < max_new_tokens) for ids in said]
        for row, said in engine.answer(requests).items()
    }


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
    """Does it satisfy the example's rule?"""
    return answer.ended and microworld.check(example, answer.text)

