"""What a summary's numbers say: which metric leads, how values are written, and the result in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.results import LOCAL, better

Summary = Mapping[str, Any]
Interval = Sequence[float] | None


@dataclass(frozen=True)
class Metric:
    title: str
    meaning: str


# In reading order; the first that a summary holds is the one the page is about.
METRICS = {
    "rule": Metric(
        "Answered right",
        "Share of held-out instructions whose answer passes the rule that comes with the instruction.",
    ),
    "rouge_l": Metric(
        "ROUGE-L",
        "Overlap with the reference answer: F-measure of the longest common subsequence of words, 100% for "
        "the same words in the same order.",
    ),
    "exact": Metric(
        "Exact match", "Share of answers equal to the reference after folding white space and case."
    ),
    "loss": Metric(
        "Held-out loss",
        "How surprised the model is by the reference answers, in nats per token of them; lower is better.",
    ),
}

TITLES = {
    "base": "Base model, untuned",
    "local mean": "Local only, mean of clients",
    "local best": "Local only, best client",
    "federated": "Federated",
    "centralised": "Centralised, pooled data",
}


SHORT = {
    "base": "Base",
    "local mean": "Mean client",
    "local best": "Best client",
    "federated": "Federated",
    "centralised": "Centralised",
}


def title(row: str) -> str:
    return f"{row.removeprefix(LOCAL)}, alone" if row.startswith(LOCAL) else TITLES.get(row, row)


def metric_title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def metrics(summary: Summary) -> list[str]:
    found = list(dict.fromkeys(r["metric"] for r in summary["rows"]))
    return [m for m in METRICS if m in found] + [m for m in found if m not in METRICS]


def main_metric(summary: Summary) -> str:
    return metrics(summary)[0]


def rows(summary: Summary) -> list[str]:
    """The rows of the table, without the single clients."""
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if not r.startswith(LOCAL)]


def single_clients(summary: Summary) -> list[str]:
    return [r for r in dict.fromkeys(r["row"] for r in summary["rows"]) if r.startswith(LOCAL)]


def seeds(summary: Summary) -> list[int]:
    return list(summary["rows"][0]["seeds"])


def entry(summary: Summary, row: str, metric: str) -> Mapping[str, Any] | None:
    return next((r for r in summary["rows"] if (r["row"], r["metric"]) == (row, metric)), None)


def best(summary: Summary, names: Sequence[str], metric: str) -> set[str]:
    """The row, or the equal rows, with the best mean; none where all are equal."""
    means = {n: found["mean"] for n in names if (found := entry(summary, n, metric)) is not None}
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


def value(metric: str, x: float | None) -> str:
    """A value as the page writes it: losses in nats, everything else a share in percent."""
    if x is None:
        return "–"
    return f"{x:.3f}" if metric == "loss" else f"{100 * x:.1f}%"


def half_width(metric: str, ci95: Interval) -> str:
    if ci95 is None:
        return ""
    half = (ci95[1] - ci95[0]) / 2
    return f"± {half:.3f}" if metric == "loss" else f"± {100 * half:.1f}"


def change(metric: str, x: float, *, digits: int = 1) -> str:
    """A signed difference, without its unit: points (of 100) or nats."""
    text = f"{x:+.3f}" if metric == "loss" else f"{100 * x:+.{digits}f}"
    return text.replace("-", "−")


def unit(metric: str) -> str:
    return "nats" if metric == "loss" else "points"


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


def verdict(summary: Summary) -> list[str]:
    """The result in plain sentences, the most important first; what the numbers do not show is said."""
    metric, names = main_metric(summary), rows(summary)
    if "federated" not in names:
        return _alone(summary, metric)
    rival = "local best" if "local best" in names else "base"
    fed, other = entry(summary, "federated", metric), entry(summary, rival, metric)
    if fed is None or other is None:
        return ["There is no federated row to read a result from."]
    found = difference(summary, "federated", rival, metric)
    gap, ci95 = found if found is not None else (fed["mean"] - other["mean"], None)
    digits = 0 if abs(gap) >= 0.1 else 1
    sentences = [
        f"{_scores('Federated tuning', metric, fed['mean'], digits)}, against "
        f"{_short(metric, other['mean'], digits)} for {_WHO[rival]}: {_amount(metric, gap, digits)}"
        f"{_interval(metric, ci95, len(seeds(summary)), digits)}."
    ]
    if ci95 is None:
        sentences.append(
            "This is one seed, which gives no interval: how much of the difference is chance is not known."
        )
    elif not excludes_zero(ci95):
        sentences.append("The interval includes zero, so these seeds do not show which of the two is better.")
    if rival != "base" and (base := entry(summary, "base", metric)) is not None:
        sentences.append(f"The untuned base model is at {_short(metric, base['mean'], digits)}.")
    pooled = entry(summary, "centralised", metric)
    if pooled is not None:
        sentences.append(_against_pooled(summary, metric, pooled["mean"]))
    return sentences


def _alone(summary: Summary, metric: str) -> list[str]:
    mean, top, base = (entry(summary, row, metric) for row in ("local mean", "local best", "base"))
    if mean is None or top is None or base is None:
        return ["Only the untuned base model was measured."]
    floor = _short(metric, base["mean"], 0)
    return [
        f"{_scores('Tuned alone, the best client', metric, top['mean'], 0)} and the mean client reaches "
        f"{_short(metric, mean['mean'], 0)}, against {floor} for the untuned base model.",
        "Nothing was shared between clients in this run.",
    ]


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
