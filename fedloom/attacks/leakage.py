"""How much models leak, in three numbers each: for comparisons, and for curves over rounds.

`extraction`: ROUGE-L between trained responses and a model's answers to their prompts, FedPIT's measure.
`auc`: how well training examples are told from held-out ones (0.5: not at all). `exposure`: bits known of a
planted canary (1.44 on average if it was never seen). All need the training data: a simulation has them,
a real server does not. `fedloom audit` measures more, with intervals and controls.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.attacks.exposure import Pool, exposures
from fedloom.attacks.extraction import extract
from fedloom.attacks.membership import membership
from fedloom.attacks.targets import Targets, with_base
from fedloom.data.template import Template
from fedloom.rows import BASE
from fedloom.state import AdapterState
from fedloom.steps import Engine


def leakage(
    engine: Engine,
    template: Template,
    on: Targets,
    rows: Mapping[str, AdapterState | None],
    *,
    max_new_tokens: int,
) -> dict[str, dict[str, float]]:
    """Every metric of every row and of the untuned base; `exposure` only if canaries were planted.

    Losses are compared with the base's, so that easy examples do not pass for leaked ones; the base itself is
    measured by its loss alone.
    """
    tuned = {row: adapter for row, adapter in rows.items() if row != BASE}
    every = with_base(tuned)
    said = extract(engine, template, tuned, on.members, on.held_out, max_new_tokens=max_new_tokens)
    told = membership(engine, on.members, on.held_out, every)
    found = {
        row: {
            "extraction": said[row].members.rouge_l.mean,
            "auc": told[row]["loss" if row == BASE else "reference"].auc,
        }
        for row in every
    }
    if on.canaries:
        known = exposures(engine, [Pool(list(on.canaries), on.twins, on.references)], every)
        for row in every:
            mean = known[row]["loss" if row == BASE else "calibrated"].planted.mean
            assert mean is not None  # there are canaries
            found[row]["exposure"] = mean
    return found
