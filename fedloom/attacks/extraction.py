"""Extraction as in FedPIT: given a training instruction, how much of the training response comes back?

The attacker knows a training example's prompt and takes the greedy answer; ROUGE-L to the trained response
tells how much came back (arXiv 2403.06131v3, section 4.3). A model that has learnt the task scores high on
prompts it never saw, and an untuned one is far from zero. So every figure stands beside the untuned base and
beside held-out examples: the part that members gain over the base and held-out examples do not is memorised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.attacks.targets import with_base
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import folded, rouge_l
from fedloom.errors import DataError
from fedloom.rows import BASE
from fedloom.state import AdapterState
from fedloom.statistics import Mean, Proportion, difference, mean, proportion
from fedloom.steps import Engine, Generate


@dataclass(frozen=True)
class Group:
    """One model's answers to one set of prompts."""

    rouge_l: Mean
    beyond_base: Mean  # the model's ROUGE-L minus the base's on the same example
    exact: Proportion  # answers that equal the reference up to case and white space
    values: tuple[float, ...]  # ROUGE-L to the reference, one per example


@dataclass(frozen=True)
class Extraction:
    members: Group
    held_out: Group
    gap: Mean  # ROUGE-L of members minus that of held-out examples
    memorised: Mean  # the same difference of gains over the base, so that unequal difficulty cancels

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def extract(
    engine: Engine,
    template: Template,
    adapters: Mapping[str, AdapterState | None],
    members: Sequence[Example],
    held_out: Sequence[Example],
    *,
    max_new_tokens: int,
) -> dict[str, Extraction]:
    """Attack several models and the untuned base (row "base") in one batch.

    Prompts are those of training, cut as training cuts them. References longer than `max_new_tokens` cannot
    come back whole.
    """
    if not members or not held_out:
        raise DataError(f"Expected members and held-out examples, got {len(members)} and {len(held_out)}.")
    rows = with_base(adapters)
    examples = [*members, *held_out]
    prompts = [_prompt(template, e) for e in examples]
    answers = engine.answer(
        {r: Generate(prompts, a, max_new_tokens=max_new_tokens, stop=template.stop) for r, a in rows.items()}
    )
    texts = {row: [template.decode(ids) for ids in answers[row]] for row in rows}
    rouge = {row: [rouge_l(e.response, t) for e, t in zip(examples, texts[row], strict=True)] for row in rows}
    return {row: _extraction(examples, texts[row], rouge[row], rouge[BASE], len(members)) for row in rows}


def _prompt(template: Template, example: Example) -> tuple[int, ...]:
    tokens, _ = template.contrast(example)  # exactly the response is labelled, whatever `loss_on` says
    return tokens.ids[: tokens.labelled.index(True)]


def _extraction(
    examples: Sequence[Example],
    texts: Sequence[str],
    values: Sequence[float],
    base: Sequence[float],
    split: int,
) -> Extraction:
    gains = [v - b for v, b in zip(values, base, strict=True)]
    same = [folded(e.response) == folded(t) for e, t in zip(examples, texts, strict=True)]

    def group(part: slice) -> Group:
        exact = same[part]
        return Group(
            mean(values[part]),
            mean(gains[part], magnitude=1.0),
            proportion(sum(exact), len(exact)),
            tuple(values[part]),
        )

    members, held_out = slice(0, split), slice(split, None)
    return Extraction(
        group(members),
        group(held_out),
        gap=difference(values[members], values[held_out]),
        memorised=difference(gains[members], gains[held_out], magnitude=1.0),
    )
