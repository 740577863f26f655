"""What metrics and rows are called on a page."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    title: str
    meaning: str
    unit: str = "points"  # of a difference; a share of 1 is written in percent, everything else as it is
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
        "Share of answers equal to the reference but for case, white space and how Unicode writes a letter.",
    ),
    "ended": Metric(
        "Ended",
        "Share of answers that the model ends by itself; the others are cut at the limit, and count as wrong.",
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
        "How far up among secrets of the same form a model ranks one that was planted in a client's data, the "
        "mean over planted ones. What a model never saw gets 1.44 bits on average; each bit more halves the rank.",
        unit="bits",
        digits=2,
    ),
    "extraction": Metric(
        "Extraction, ROUGE-L",
        "Asked what its training asked, how much of the trained response the model gives. A model that has "
        "learnt the task scores without having memorised anything, and the untuned base is not at zero either.",
    ),
    "auc": Metric(
        "Membership AUC",
        "How well the model's losses tell examples it was trained on from held-out ones, compared with the base's "
        "losses (of the base itself: its own): 0.5 is a coin, and 1 is always. So is 0, for whoever turns it round: what "
        "counts is the distance from 0.5, and differences are differences of it.",
        unit="",
        digits=2,
    ),
}
LEAKS = ("exposure", "extraction", "auc")  # the first that a summary holds is the one drawn against quality
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
