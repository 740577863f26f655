"""The names of metrics, rows and algorithms, and the format of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.evaluation.metrics import COIN, LOWER
from fedloom.rows import Row

Interval = Sequence[float] | None


@dataclass(frozen=True)
class Metric:
    title: str
    meaning: str
    unit: str = "points"  # of a difference; shares are written in percent, everything else unscaled
    digits: int = 1


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
        "Exact match",
        "Share of answers equal to the reference except for case, white space and Unicode form.",
    ),
    "ended": Metric(
        "Ended",
        "Share of answers that the model ends by itself; the others are cut at the limit and count as wrong.",
    ),
    "end_loss": Metric(
        "Loss of the end",
        "How surprised the model is where a reference answer ends, in nats of the end token; lower is better.",
        unit="nats",
        digits=3,
    ),
    "loss": Metric(
        "Held-out loss",
        "How surprised the model is by the reference answers, in nats per token of them; lower is better.",
        unit="nats",
        digits=3,
    ),
    "exposure": Metric(
        "Exposure, bits",
        "How high a model ranks a secret planted in a client's data among secrets of the same form, averaged over "
        "planted ones. A secret never seen gets 1.44 bits on average; each further bit halves the rank.",
        unit="bits",
        digits=2,
    ),
    "extraction": Metric(
        "Extraction, ROUGE-L",
        "How much of the training response comes back after a training instruction. A model that has learnt the "
        "task scores without having memorised anything, and the untuned base is not at zero either.",
    ),
    "auc": Metric(
        "Membership AUC",
        "How well the model's losses, relative to the base's, tell training examples from held-out ones (for the "
        "base, its own losses): 0.5 is a coin toss and 1 is certainty. So is 0, with the answers reversed: the "
        "distance from 0.5 counts, and differences are differences between such distances.",
        unit="",
        digits=2,
    ),
}
NOT_SEEN = 1 / math.log(2)  # bits: mean exposure of a secret that a model never saw

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


def title(row: str, own: str | None = None) -> str:
    """A row's title. `own` names the algorithm behind "federated", where the title should include it."""
    if row in TITLES:
        return f"{TITLES[row]} ({own})" if row == "federated" and own else TITLES[row]
    its = Row.parse(row)
    if its.alone:
        return f"{its.client}, alone"
    beside = ["personal"] if its.beside else []
    one = [{"mean": "mean of clients", "best": "best client"}[its.statistic]] if its.statistic else []
    if not (beside or one or its.client):
        return row
    return ", ".join([title(its.label, own), *beside, *one, *([its.client] if its.client else [])])


def short(row: str) -> str:
    return SHORT.get(row) or title(row)


def model(row: str) -> str:
    """Whose model it is, in words: everybody's, a client's, or that of one owner of everything."""
    its = Row.parse(row)
    return f"{its.of}, {its.statistic}" if its.statistic else its.of


def metric_title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def arrow(metric: str) -> str:
    return f"→ {COIN:g}" if metric == "auc" else "↓" if metric in LOWER else "↑"


def less(metric: str) -> str:
    """Which values of a leakage metric are better, in words for an axis or a caption."""
    return f"nearer {COIN:g} is better" if metric == "auc" else "less is better"


# --- numbers ---------------------------------------------------------------------------------------------


def factor(metric: str) -> int:
    """The factor by which a value is multiplied for display: shares are shown as percentages."""
    return 100 if _scale(metric).unit == "points" else 1


def unit(metric: str) -> str:
    """The unit of a difference."""
    return _scale(metric).unit


def axis(metric: str) -> str:
    """The metric's title on an axis."""
    if metric == "loss":
        return f"{metric_title(metric)}, nats per token (lower is better)"
    return metric_title(metric) + (", %" if factor(metric) == 100 else "")


def value(metric: str, x: float | None) -> str:
    """A value as the page shows it: shares in percent, others in their unit."""
    if x is None:
        return "–"
    return f"{factor(metric) * x:.{_scale(metric).digits}f}{'%' if factor(metric) == 100 else ''}"


def half_width(metric: str, ci95: Interval) -> str:
    return "" if ci95 is None else f"± {factor(metric) * (ci95[1] - ci95[0]) / 2:.{_scale(metric).digits}f}"


def change(metric: str, x: float, *, digits: int | None = None) -> str:
    """A signed difference without its unit; `digits` applies to percentage points only."""
    fixed = digits if digits is not None and factor(metric) == 100 else _scale(metric).digits
    return f"{factor(metric) * x:+.{fixed}f}".replace("-", "−")


def _scale(metric: str) -> Metric:
    return METRICS.get(metric, Metric(metric, ""))


def count(found: Mapping[str, Any], *, most: int) -> str:
    """A mean number of clients; the interval is cut to counts that can occur."""
    low, high = (min(max(x, 0.0), float(most)) for x in found["ci95"])
    return f"{found['mean']:.1f} ({low:.1f} to {high:.1f})"


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
