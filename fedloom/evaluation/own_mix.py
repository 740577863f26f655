"""Should a client take part or tune alone? Judged on held-out examples in the mix of its own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.evaluation.metrics import LOWER
from fedloom.rows import FEDERATED, local
from fedloom.statistics import estimate

Groups = Mapping[str, Mapping[str, float]]  # group -> metric -> value, of one row

GAIN, TIE, LOSE = OUTCOMES = ("gain", "tie", "lose")
COUNTED = ("rule", "exact")  # shares of answers, each right or wrong
PRINTED = 0.0005  # half of the last printed digit of a loss or a ROUGE-L


def in_mix(groups: Groups, counts: Mapping[str, int], metric: str) -> float | None:
    """A row's value with groups weighted by `counts`; None if it lacks one of them, since a mean over the
    others would be another mix."""
    held = {g: n for g, n in counts.items() if n}
    if not held or any(metric not in groups.get(g, {}) for g in held):
        return None
    return sum(n * groups[g][metric] for g, n in held.items()) / sum(held.values())


def resolution(metric: str, counts: Mapping[str, int], answered: Mapping[str, int]) -> float:
    """The least difference that counts in a client's mix: one answer for COUNTED metrics, else PRINTED."""
    weights = [n / answered[g] for g, n in counts.items() if n and answered.get(g)]
    if metric not in COUNTED or not weights:
        return PRINTED
    return min(weights) / sum(counts.values())


def outcomes(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """metric -> each client's values per seed, federated and tuned alone; and how many gain, tie and lose.

    The counts are means over seeds with intervals: the clients of one seed share a model, so they are not a
    sample. `results` are as `measure` makes them; those without a mix, or without the rows, are left out.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        rows, answered = result["rows"], result.get("answered", {})
        for metric in rows.get(FEDERATED, {}).get("metrics", {}):
            clients: dict[str, dict[str, Any]] = {}
            for client, counts in result.get("mix", {}).items():
                own = rows.get(str(local(client)))
                ours = in_mix(rows[FEDERATED]["groups"], counts, metric)
                theirs = None if own is None else in_mix(own["groups"], counts, metric)
                if ours is None or theirs is None:
                    continue
                gap = theirs - ours if metric in LOWER else ours - theirs
                least = resolution(metric, counts, answered) * (1 - 1e-9)  # one more answer counts
                outcome = TIE if abs(gap) < least else GAIN if gap > 0 else LOSE
                clients[client] = {"shared": ours, "alone": theirs, "outcome": outcome}
            if clients:
                told.setdefault(metric, []).append({"seed": result["seed"], "clients": clients})
    return {metric: {"seeds": seeds, **_counts(seeds)} for metric, seeds in told.items()}


def _counts(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """outcome -> how many clients have it, over seeds."""
    found = {}
    for outcome in OUTCOMES:
        over = estimate([sum(c["outcome"] == outcome for c in seed["clients"].values()) for seed in seeds])
        found[outcome] = {"mean": over.mean, "ci95": over.ci95, "values": over.values}
    return found
