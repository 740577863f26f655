"""Losses by round and participation, read from the journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

Record = Mapping[str, Any]
What = Literal["train", "held_out"]
Part = Literal["not selected", "took part", "refused", "no answer"]


def loss_curve(records: Sequence[Record], *, what: What) -> dict[int, float]:
    """round -> loss, for the rounds that have one."""
    found = {r["round"]: r["loss"] if what == "train" else (r["held_out"] or {}).get("loss") for r in records}
    return {r: loss for r, loss in found.items() if loss is not None}


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over seeds, in the rounds that every seed has."""
    if not curves:
        return {}
    return {r: fmean(c[r] for c in curves) for r in curves[0] if all(r in c for c in curves)}


def base_loss(journals: Mapping[str, Sequence[Sequence[Record]]]) -> float | None:
    """Held-out loss before the first round, when nothing is tuned yet; the mean over seeds."""
    for seeds in journals.values():
        before = [c[0] for records in seeds if 0 in (c := loss_curve(records, what="held_out"))]
        if before:
            return fmean(before)
    return None


def part(record: Record, client: str) -> Part:
    """What a client did in a round."""
    if client in record["refused"]:
        return "refused"
    if client in record["clients"]:
        return "took part"
    return "no answer" if client in record["cohort"] else "not selected"


def counts(client: str, records: Sequence[Record]) -> tuple[int, int, int]:
    """The numbers of rounds in which the client was selected, took part, and was refused."""
    did = [part(r, client) for r in records if r["round"] > 0]
    return len(did) - did.count("not selected"), did.count("took part"), did.count("refused")


def took_part(clients: Sequence[str], records: Sequence[Record]) -> str:
    """Participation in one or two sentences."""
    rounds = sum(r["round"] > 0 for r in records)
    if not rounds:
        return ""
    selected, trained, refused = zip(*(counts(c, records) for c in clients), strict=True)
    if all(n == rounds for n in trained):
        said = f"All {len(clients)} clients took part in all {rounds} rounds."
    else:
        never = f"; {selected.count(0)} of {len(clients)} were never selected" if 0 in selected else ""
        said = f"Over {rounds} rounds a client took part {fmean(trained):.1f} times on average{never}."
    total = sum(refused)
    return said + (f" {total} {'updates were' if total > 1 else 'update was'} refused." if total else "")
