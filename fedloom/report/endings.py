"""Do a model's answers end? One reading, for the terminal, the page and the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedloom.report import findings, terms

FEW = 0.95  # a smaller share of answers that end by themselves is worth mentioning
UNLEARNT = math.log(
    2
)  # nats of the end token where an answer ends; below, it is likelier than all others together

_OTHER_END = (
    'Close answers with a token that the base has learnt (prompt.format = "alpaca" or "plain" closes them with the '
    "tokenizer's end of text), or choose a base that was tuned in this chat format; an adapter never reaches the output head."
)


def shown(summary: Mapping[str, Any]) -> bool:
    """Whether some tuned row's share of ended answers is low enough to show even where room is short."""
    tuned = [row for row in findings.rows(summary) if row != "base"]
    return any(
        (found := findings.entry(summary, row, "ended")) is not None and found["mean"] < FEW for row in tuned
    )


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Remarks on how the tuned model's answers end; none where nearly all end by themselves."""
    row = next((name for name in ("federated", "local mean") if findings.entry(summary, name, "ended")), None)
    ended, loss = (findings.entry(summary, row, metric) if row else None for metric in ("ended", "end_loss"))
    if row is None or ended is None or ended["mean"] >= FEW:
        return []
    limit = summary["experiment"]["evaluation"]["max_new_tokens"]
    said = (
        f"{terms.title(row)}: {terms.value('ended', ended['mean'])} of the answers end by themselves; the others are cut "
        f"at {limit} tokens and count as wrong."
    )
    if loss is not None and loss["mean"] < UNLEARNT:
        return [f"{said} The end is learnt, so they may only be longer: raise evaluation.max_new_tokens."]
    engine = summary["engine"]
    if loss is None:  # every reference is cut before its end
        return [f"{said} No end was trained or measured: every response is longer than prompt.max_length."]
    said += f" Where an answer ends, {engine.get('end', 'the end token')} costs the model {loss['mean']:.1f} nats: the end is not learnt."
    if not engine.get("end_reachable", True):
        return [f"{said} It looks untrained in the base's output head, which stays frozen. {_OTHER_END}"]
    return [f"{said} Train longer: more rounds, or a higher local.learning_rate."]


def unreachable(token: str) -> str:
    """A warning before training about an end token whose row in the frozen output head can hardly win."""
    return (
        f"the end of an answer, {token}, looks untrained in the base model's output head, which stays frozen: "
        f"answers may never end. {_OTHER_END}"
    )
