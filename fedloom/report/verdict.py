"""The result of a run or a comparison in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.evaluation.metrics import LEAKS, LOWER, better, improves
from fedloom.evaluation.own_mix import OUTCOMES
from fedloom.report.findings import (
    Summary,
    difference,
    entry,
    excludes_zero,
    leaks,
    main_metric,
    methods,
    own,
    own_mix,
    rows,
    seeds,
)
from fedloom.report.terms import Interval, change, count, metric_title, model, title, unit, value
from fedloom.rows import Row

_WHO = {
    "base": "the untuned base model",
    "local mean": "the mean single client",
    "local best": "the best single client",
    "centralised": "centralised tuning on the pooled data",
}


def _who(row: str) -> str:
    """A row inside a sentence."""
    its = Row.parse(row)
    if row not in _WHO and its.statistic:
        return f"the {its.statistic} {'personal model' if its.beside else 'client'} of {title(its.label)}"
    return _WHO.get(row) or title(row)


def strongest_rival(summary: Summary, row: str = "federated") -> str | None:
    """The best other row by the page's metric, whoever's model it is: a client's best alternative.

    Clients cannot choose to pool data, so centralised tuning is treated separately; the untuned base is a
    rival only where there is no other.
    """
    metric = main_metric(summary)
    others = [r for r in rows(summary) if r not in (row, "base", "centralised")] or ["base"]
    means = {r: e["mean"] for r in others if (e := entry(summary, r, metric)) is not None}
    return next((r for r, x in means.items() if not any(better(metric, y, x) for y in means.values())), None)


def verdict(summary: Summary) -> list[str]:
    """The result in plain sentences, the most important first, including what the numbers do not show."""
    metric, names = main_metric(summary), rows(summary)
    if "federated" not in names:
        return _alone(summary, metric)
    rival = strongest_rival(summary)
    fed, other = entry(summary, "federated", metric), entry(summary, rival, metric) if rival else None
    if fed is None or rival is None or other is None:
        return ["There is no federated row to read a result from."]
    found = difference(summary, "federated", rival, metric)
    gap, ci95 = found if found is not None else (fed["mean"] - other["mean"], None)
    digits = 0 if abs(gap) >= 0.1 else 1
    tuning = "Federated tuning" + ("" if own(summary) == "FedIT" else f" by {own(summary)}")
    sentences = [
        f"{_scores(tuning, metric, fed['mean'], digits)}, against "
        f"{_short(metric, other['mean'], digits)} for {_who(rival)}: {_amount(metric, gap, digits)}"
        f"{_interval(metric, ci95, len(seeds(summary)), digits)}."
    ]
    if ci95 is None:
        sentences.append(
            "This is one seed, which gives no interval: how much of the difference is chance is not known."
        )
    elif not excludes_zero(ci95):
        sentences.append("The interval includes zero, so these seeds do not show which of the two is better.")
    sentences += [
        *_doing_better(summary, metric, "federated"),
        *taking_part(summary),
        *_against_fedit(summary, metric),
    ]
    if rival != "base" and (base := entry(summary, "base", metric)) is not None:
        sentences.append(f"The untuned base model is at {_short(metric, base['mean'], digits)}.")
    pooled = entry(summary, "centralised", metric)
    if pooled is not None:
        sentences.append(_against_pooled(summary, metric, pooled["mean"]))
    return sentences


def taking_part(summary: Summary) -> list[str]:
    """How many clients gain, tie and lose on their own mix of data, in one sentence; none if not measured."""
    judged_by = own_mix(summary)
    if judged_by is None:
        return []
    metric, found = judged_by
    counts = [len(seed["clients"]) for seed in found["seeds"]]
    clients = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    gain, tie, lose = (found[outcome] for outcome in OUTCOMES)
    of = f"Taking part or tuning alone, each judged on its own mix of data ({metric_title(metric)}): of {clients} client{'' if clients == '1' else 's'} "
    if gain["ci95"] is None:
        return [
            f"{of}{gain['mean']:.0f} gain by taking part, {tie['mean']:.0f} tie and {lose['mean']:.0f} lose; one seed, so no interval."
        ]
    written = [count(one, most=max(counts)) for one in (gain, tie, lose)]
    return [
        f"{of}{written[0]} gain by taking part, {written[1]} tie and {written[2]} lose (means over {len(counts)} seeds, 95% intervals)."
    ]


def _doing_better(summary: Summary, metric: str, row: str) -> list[str]:
    """Every row with a better mean, best first; those not clearly different from `row` are marked."""
    mine = entry(summary, row, metric)
    if mine is None:
        return []
    means = {r: e["mean"] for r in rows(summary) if r != row and (e := entry(summary, r, metric)) is not None}
    ahead = [r for r, x in means.items() if better(metric, x, mine["mean"])]
    if not ahead:
        return []
    said = []
    for other in sorted(ahead, key=lambda r: means[r], reverse=metric not in LOWER):
        found = difference(summary, other, row, metric)
        unclear = found is not None and found[1] is not None and not excludes_zero(found[1])
        said.append(f"{_who(other)} ({_short(metric, means[other], 1)}{', not clearly' if unclear else ''})")
    listed = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return [f"Better on average {'is' if len(said) == 1 else 'are'} {listed}."]


def _alone(summary: Summary, metric: str) -> list[str]:
    mean, top, base = (entry(summary, row, metric) for row in ("local mean", "local best", "base"))
    if mean is None or top is None or base is None:
        return ["Only the untuned base model was measured."]
    floor = _short(metric, base["mean"], 0)
    return [
        f"{_scores('Tuned alone, the best client', metric, top['mean'], 0)} and the mean client reaches "
        f"{_short(metric, mean['mean'], 0)}, against {floor} for the untuned base model.",
        *_doing_better(summary, metric, "local best"),
        *(
            []
            if any(model(r) == "global" for r in rows(summary))
            else ["Nothing was shared between clients in this run."]
        ),
    ]


def _against_fedit(summary: Summary, metric: str) -> list[str]:
    """The experiment's own algorithm beside FedIT, if both were compared, in quality and in exposure."""
    label = next((label for label, its in methods(summary).items() if its["name"] == "fedavg"), None)
    if label is None or own(summary) == "FedIT":
        return []
    said = []
    for what, m in (("In quality", metric), ("In leakage", next(iter(leaks(summary)), None))):
        found = difference(summary, "federated", label, m) if m else None
        one, other = (entry(summary, row, m) for row in ("federated", label)) if m else (None, None)
        if m is None or found is None or one is None or other is None:
            continue
        gap, ci95 = found
        shown = f"{what}, {own(summary)} is at {value(m, one['mean'])} and {label} at {value(m, other['mean'])} ({metric_title(m)}"
        if ci95 is None:
            said.append(f"{shown}; one seed, so no interval).")
            continue
        shown += f"; difference {change(m, gap)} {unit(m)}".rstrip() + f", {_range(m, ci95, 1)})"
        if not excludes_zero(ci95):
            said.append(f"{shown}: the interval includes zero, so these seeds do not tell the two apart.")
        else:
            said.append(
                f"{shown}: {own(summary) if improves(m, gap) else label} {'leaks less' if m in LEAKS else 'is better'}."
            )
    return said


def _against_pooled(summary: Summary, metric: str, pooled: float) -> str:
    found = difference(summary, "centralised", "federated", metric)
    gap, ci95 = found if found is not None else (0.0, None)
    digits = 0 if abs(gap) >= 0.1 else 1
    begin = (
        f"Centralised tuning, with everybody's data in one place, reaches {_short(metric, pooled, digits)}"
    )
    if found is None or ci95 is None:
        return f"{begin}."
    said = (
        f"{_amount(metric, gap, digits)} than federated{_interval(metric, ci95, len(seeds(summary)), digits)}"
    )
    return (
        f"{begin}: {said}."
        if excludes_zero(ci95)
        else f"{begin}: no clear difference from federated ({_range(metric, ci95, digits)})."
    )


def _scores(who: str, metric: str, mean: float, digits: int) -> str:
    if metric == "rule":
        return f"{who} answers {_short(metric, mean, digits)} of held-out instructions right"
    if metric == "loss":
        return f"{who} reaches a held-out loss of {_short(metric, mean, digits)} nats per token"
    return f"{who} scores {_short(metric, mean, digits)} {metric_title(metric)} on held-out instructions"


def _short(metric: str, x: float, digits: int) -> str:
    return f"{x:.3f}" if metric == "loss" else f"{100 * x:.{digits}f}%"


def _amount(metric: str, gap: float, digits: int) -> str:
    if metric == "loss":
        return f"{abs(gap):.3f} {'lower' if gap < 0 else 'higher'}"
    return f"{100 * abs(gap):.{digits}f} points {'more' if gap >= 0 else 'less'}"


def _interval(metric: str, ci95: Interval, count: int, digits: int) -> str:
    return "" if ci95 is None else f" ({_range(metric, ci95, digits)}, {count} seeds)"


def _range(metric: str, ci95: Sequence[float], digits: int) -> str:
    low, high = (change(metric, x, digits=digits) for x in ci95)
    return f"95% interval {low} to {high}"
