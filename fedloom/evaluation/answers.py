"""What a model answers to held-out instructions, and how right that is.

Metrics are shares in [0, 1]: "rule" is the microworld's own check, "exact" equality with the reference
after folding white space and case, "rouge_l" the F-measure of the longest common subsequence of words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import rouge_l
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate


def answer(
    engine: Engine,
    template: Template,
    test: Sequence[Example],
    adapters: Mapping[Any, AdapterState | None],
    *,
    max_new_tokens: int,
) -> dict[Any, list[str]]:
    """Greedy answers of several adapters in shared batches; None is the untuned base."""
    prompts = [template.prompt_ids(e, room=max_new_tokens) for e in test]
    requests = {
        row: Generate(prompts, adapter, max_new_tokens=max_new_tokens, stop=template.stop)
        for row, adapter in adapters.items()
    }
    return {row: [template.decode(ids) for ids in said] for row, said in engine.answer(requests).items()}


def grade(test: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """Mean of every metric that applies to these examples."""
    pairs = list(zip(test, answers, strict=True))
    metrics = {
        "exact": fmean(_folded(e.response) == _folded(a) for e, a in pairs),
        "rouge_l": fmean(rouge_l(e.response, a) for e, a in pairs),
    }
    if all(e.rule for e in test):
        metrics = {"rule": fmean(microworld.check(e, a) for e, a in pairs), **metrics}
    return metrics


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
