"""What a summary's numbers say: which metric leads, how values are written, and the result in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.algorithms import names
from fedloom.evaluation.own_mix import OUTCOMES
from fedloom.experiment.summary import COIN, LOCAL, LOWER, better, improves, is_single, model_of
from fedloom.report.terms import LEAKS, METRICS, SHORT, TITLES, Metric
from fedloom.report.terms import NOT_SEEN as NOT_SEEN

Summary = Mapping[str, Any]
Interval = Sequence[float] | None


def own(summary: Summary) -> str:
    """What the experiment's own algorithm is called."""
    return names.title(str(summary["experiment"]["algorithm"]["name"]))


def title(row: str, own: str | None = None) -> str:
    """`own` is the name of the algorithm behind "federated", where it is to be said."""
    label, _, client = row.partition(":")
    if client:
        return f"{client}, alone" if row.startswith(LOCAL) else f"{title(label, own)}, {client}"
    if row in TITLES:
        return f"{TITLES[row]} ({own})" if row == "federated" and own else TITLES[row]
    for end, said in ((" mean", "mean of clients"), (" best", "best client"), (" personal", "personal")):
        if row.endswith(end):
            return f"{title(row.removesuffix(end), own)}, {said}"
    return row


def short(row: str) -> str:
    return SHORT.get(row) or title(row)


def model(row: str) -> str:
    """Whose model it is, in words: everybody's, a client's, or one owner's of everything."""
    end = next((said for end, said in ((" mean", ", mean"), (" best", ", best")) if row.endswith(end)), "")
    return model_of(row) + end


def metric_title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def arrow(metric: str) -> str:
    return f"→ {COIN:g}" if metric == "auc" else "↓" if metric in LOWER else "↑"


def less(metric: str) -> str:
    """How a metric of leakage is judged, in words for an axis or a caption."""
    return f"nearer {COIN:g} is better" if metric == "auc" else "less is better"


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
    """The rows of the table, without the single clients."""
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if not is_single(r)]


def single_clients(summary: Summary) -> list[str]:
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if is_single(r)]


def methods(summary: Summary) -> Mapping[str, Mapping[str, Any]]:
    """label -> settings of the further algorithms that were compared."""
    found: Mapping[str, Mapping[str, Any]] = summary["experiment"].get("compare", {}).get("methods", {})
    return found


def seeds(summary: Summary) -> list[int]:
    return list(summary["rows"][0]["seeds"])


def entry(summary: Summary, row: str, metric: str) -> Mapping[str, Any] | None:
    return next((r for r in summary["rows"] if (r["row"], r["metric"]) == (row, metric)), None)


def best(summary: Summary, names: Sequence[str], metric: str) -> set[str]:
    """The row, or the equal rows, with the best mean; none where all are equal.

    Of leakage the untuned base is no candidate: it has nothing to leak.
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


# --- numbers ---------------------------------------------------------------------------------------------


def factor(metric: str) -> int:
    """What a value is multiplied with to be written: shares are percentages."""
    return 100 if _scale(metric).unit == "points" else 1


def unit(metric: str) -> str:
    """Of a difference."""
    return _scale(metric).unit


def axis(metric: str) -> str:
    """The metric as an axis names it."""
    if metric == "loss":
        return f"{metric_title(metric)}, nats per token (lower is better)"
    return metric_title(metric) + (", %" if factor(metric) == 100 else "")


def value(metric: str, x: float | None) -> str:
    """A value as the page writes it: shares in percent, the rest in their unit."""
    if x is None:
        return "–"
    return f"{factor(metric) * x:.{_scale(metric).digits}f}{'%' if factor(metric) == 100 else ''}"


def half_width(metric: str, ci95: Interval) -> str:
    return "" if ci95 is None else f"± {factor(metric) * (ci95[1] - ci95[0]) / 2:.{_scale(metric).digits}f}"


def change(metric: str, x: float, *, digits: int | None = None) -> str:
    """A signed difference, without its unit; `digits` are of points only."""
    fixed = digits if digits is not None and factor(metric) == 100 else _scale(metric).digits
    return f"{factor(metric) * x:+.{fixed}f}".replace("-", "−")


def _scale(metric: str) -> Metric:
    return METRICS.get(metric, Metric(metric, ""))


def byte_size(count: float) -> str:
    for name in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {name}" if name == "B" else f"{count:.1f} {name}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# --- words -----------------------------------------------------------------------------------------------

_WHO = {
    "base": "the untuned base model",
    "local mean": "the mean single client",
    "local best": "the best single client",
    "centralised": "centralised tuning on the pooled data",
}


def _who(row: str) -> str:
    """A row inside a sentence."""
    for end, said in (
        (" personal mean", "the mean personal model of"),
        (" personal best", "the best personal model of"),
        (" mean", "the mean client of"),
        (" best", "the best client of"),
    ):
        if row not in _WHO and row.endswith(end):
            return f"{said} {title(row.removesuffix(end))}"
    return _WHO.get(row) or title(row)


def strongest_rival(summary: Summary, row: str = "federated") -> str | None:
    """The best other row by the page's metric, whoever's model it is: what a client could do instead.

    Pooled data are no choice that clients have, so centralised tuning is told apart; the untuned base is a rival where
    there is no other.
    """
    metric = main_metric(summary)
    others = [r for r in rows(summary) if r not in (row, "base", "centralised")] or ["base"]
    means = {r: e["mean"] for r in others if (e := entry(summary, r, metric)) is not None}
    return next((r for r, x in means.items() if not any(better(metric, y, x) for y in means.values())), None)


def verdict(summary: Summary) -> list[str]:
    """The result in plain sentences, the most important first; what the numbers do not show is said."""
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


def _doing_better(summary: Summary, metric: str, row: str) -> list[str]:
    """Every row with a better mean, best first; those that the seeds do not tell from `row` are marked."""
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


def own_mix(summary: Summary) -> tuple[str, Mapping[str, Any]] | None:
    """Who gains by taking part, by the first metric that tells it of as many clients as any does: where few questions
    are asked, a client may hold groups of which none is, and only its loss is known."""
    found: Mapping[str, Any] = summary.get("own_mix", {})
    told = {
        m: sum(len(seed["clients"]) for seed in found[m]["seeds"]) for m in metrics(summary) if m in found
    }
    return next(((m, found[m]) for m, n in told.items() if n == max(told.values())), None)


def taking_part(summary: Summary) -> list[str]:
    """What each client decides, in a sentence: how many gain, tie and lose on their own mix of data; none where that
    was not measured."""
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


def count(found: Mapping[str, Any], *, most: int) -> str:
    """A mean number of clients; an interval of a few seeds may reach beyond what can be, which is not written."""
    low, high = (min(max(x, 0.0), float(most)) for x in found["ci95"])
    return f"{found['mean']:.1f} ({low:.1f} to {high:.1f})"


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
    """How the experiment's own algorithm does beside FedIT, where that was compared, in quality and in exposure."""
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
