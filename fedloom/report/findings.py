"""Read a summary: its metrics and rows, the best of them, and their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.algorithms import names
from fedloom.evaluation.metrics import LEAKS, better
from fedloom.report.terms import METRICS, Interval
from fedloom.rows import is_single

Summary = Mapping[str, Any]


def own(summary: Summary) -> str:
    """The name of the experiment's own algorithm."""
    return names.title(str(summary["experiment"]["algorithm"]["name"]))


def metrics(summary: Summary) -> list[str]:
    found = list(dict.fromkeys(r["metric"] for r in summary["rows"]))
    return [m for m in METRICS if m in found] + [m for m in found if m not in METRICS]


def main_metric(summary: Summary) -> str:
    return metrics(summary)[0]


def leaks(summary: Summary) -> list[str]:
    """The metrics of leakage that were measured."""
    found = metrics(summary)
    return [m for m in LEAKS if m in found]


def rows(summary: Summary) -> list[str]:
    """The rows of the table, without single clients."""
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if not is_single(r)]


def single_clients(summary: Summary) -> list[str]:
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if is_single(r)]


def methods(summary: Summary) -> Mapping[str, Mapping[str, Any]]:
    """label -> settings, for the further algorithms that were compared."""
    found: Mapping[str, Mapping[str, Any]] = summary["experiment"].get("compare", {}).get("methods", {})
    return found


def seeds(summary: Summary) -> list[int]:
    return list(summary["rows"][0]["seeds"])


def entry(summary: Summary, row: str, metric: str) -> Mapping[str, Any] | None:
    return next((r for r in summary["rows"] if (r["row"], r["metric"]) == (row, metric)), None)


def best(summary: Summary, names: Sequence[str], metric: str) -> set[str]:
    """The row, or the equal rows, with the best mean; none where all are equal.

    For leakage the untuned base does not count: it has nothing to leak.
    """
    means = {n: found["mean"] for n in names if (found := entry(summary, n, metric)) is not None}
    if metric in LEAKS:
        means.pop("base", None)
    if len(set(means.values())) < 2:
        return set()
    return {
        n for n, mean in means.items() if not any(better(metric, other, mean) for other in means.values())
    }


def difference(summary: Summary, a: str, b: str, metric: str) -> tuple[float, Interval] | None:
    """a - b and its interval, whichever way round the summary holds it."""
    for d in summary["differences"]:
        if d["metric"] == metric and (d["a"], d["b"]) == (a, b):
            return d["mean"], d["ci95"]
        if d["metric"] == metric and (d["a"], d["b"]) == (b, a):
            return -d["mean"], None if d["ci95"] is None else (-d["ci95"][1], -d["ci95"][0])
    return None


def excludes_zero(ci95: Interval) -> bool:
    return ci95 is not None and (ci95[0] > 0 or ci95[1] < 0)


def own_mix(summary: Summary) -> tuple[str, Mapping[str, Any]] | None:
    """Who gains by taking part, by the first metric that is known for the most clients.

    Where few questions are asked, none may come from a client's groups; then only its loss is known.
    """
    found: Mapping[str, Any] = summary.get("own_mix", {})
    told = {
        m: sum(len(seed["clients"]) for seed in found[m]["seeds"]) for m in metrics(summary) if m in found
    }
    return next(((m, found[m]) for m, n in told.items() if n == max(told.values())), None)
