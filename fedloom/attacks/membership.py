"""Membership inference: can a record's score tell whether it was trained on?

Scores of one record; the higher, the likelier a member. l is the loss in mean nats per labelled token:

- loss: -l
- reference: l under the base model minus l, so that easy text does not stand out
- zlib: -l per byte of the compressed text (Carlini et al. 2021, https://arxiv.org/abs/2012.07805)
- min_k: mean of the lowest fifth of the tokens' log p (Shi et al. 2024, https://arxiv.org/abs/2310.16789)
- min_k_plus: the same of (log p - mean) / std, both under the model's own next-token distribution
  (Zhang et al. 2025, Min-K%++, https://arxiv.org/abs/2404.02936)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import rankdata

from fedloom.data.example import Example
from fedloom.errors import DataError, ModelError
from fedloom.state import AdapterState
from fedloom.statistics import Proportion, proportion
from fedloom.steps import Engine, Score, Scored

Row = TypeVar("Row", bound=Hashable)

LOWEST = 0.2  # Min-K%: the share of tokens that count
DIGITS = 5  # kept of a difference of two float32 losses: those below are rounding, and would affect ranks
FALSE_POSITIVES = (0.01, 0.001)
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class AtRate:
    """True positives if at most a share `target` of the non-members is taken for members."""

    target: float
    tpr: Proportion
    fpr: Proportion  # on the same non-members that set the threshold


@dataclass(frozen=True)
class Membership:
    """How well one score separates members from non-members; chance is an AUC of 1/2."""

    members: int
    nonmembers: int
    auc: float
    auc_ci95: tuple[float, float]
    at: tuple[AtRate, ...]  # false positive rates of 1% and 0.1%

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def response(example: Example) -> str:
    return example.response


def membership(
    engine: Engine,
    members: Sequence[Example],
    nonmembers: Sequence[Example],
    adapters: Mapping[Row, AdapterState | None],
    *,
    text: Callable[[Example], str] = response,
) -> dict[Row, dict[str, Membership]]:
    """Attack several adapters in shared batches: row -> score -> how well it separates.

    None for an adapter attacks the untuned base. Include it: members and non-members that differ by more
    than membership separate there, too. `text` picks what zlib compresses: the part that is learnt.
    Records without a token to score are refused.
    """
    records = [*members, *nonmembers]
    compressed = [len(zlib.compress(text(record).encode())) for record in records]
    base = object()
    requests: dict[Hashable, Score] = {base: Score(records)}
    answers = engine.answer(
        requests | {row: Score(records, a, per_token=True) for row, a in adapters.items()}
    )
    found: dict[Row, dict[str, Membership]] = {}
    for row, adapter in adapters.items():
        # The base is compared with its own answer: in bfloat16 two answers differ by more than DIGITS hide.
        untuned = answers[row if adapter is None else base]
        scored = [
            scores(one, before, compressed=size)
            for one, before, size in zip(answers[row], untuned, compressed, strict=True)
        ]
        found[row] = {
            name: separation(
                [s[name] for s in scored[: len(members)]], [s[name] for s in scored[len(members) :]]
            )
            for name in scored[0]
        }
    return found


def scores(tuned: Scored, base: Scored, *, compressed: int) -> dict[str, float]:
    """Every score of one record; `compressed` is its length in bytes under zlib."""
    tokens = tuned.tokens
    if not tuned.targets:
        raise DataError("A record has no token to score; leave records without a response out.")
    if tokens is None:
        raise DataError("Min-K% needs token scores: ask for them with Score(..., per_token=True).")
    loss = tuned.nll / tuned.targets
    standing = [
        # If the model is certain, so that nothing varies, the certain token is no surprise.
        (logp - mean) / max(std, 1e-6)
        for logp, mean, std in zip(tokens.logp, tokens.mean, tokens.std, strict=True)
    ]
    return {
        "loss": -loss,
        "reference": round(base.nll / base.targets - loss, DIGITS),
        "zlib": -loss / compressed,
        "min_k": lowest(tokens.logp),
        "min_k_plus": lowest(standing),
    }


def lowest(values: Sequence[float], *, share: float = LOWEST) -> float:
    """Mean of the lowest share of the values, at least one."""
    return fmean(sorted(values)[: max(1, int(len(values) * share))])


def separation(members: Sequence[float], nonmembers: Sequence[float]) -> Membership:
    """For any score that is higher for members: AUC, and true positives at few false ones."""
    inside, outside = np.asarray(members, float), np.asarray(nonmembers, float)
    if not len(inside) or not len(outside):
        raise DataError(f"Expected members and non-members, got {len(inside)} and {len(outside)}.")
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise ModelError("A score is NaN: the adapter has diverged and cannot be attacked.")
    found = auc(inside, outside)
    return Membership(
        members=len(inside),
        nonmembers=len(outside),
        auc=found,
        auc_ci95=auc_interval(found, members=len(inside), nonmembers=len(outside)),
        at=tuple(at_rate(inside, outside, target=target) for target in FALSE_POSITIVES),
    )


def auc(members: NDArray[np.float64], nonmembers: NDArray[np.float64]) -> float:
    """The probability that a member scores above a non-member; a tie counts half."""
    ranks = rankdata(np.concatenate([members, nonmembers]))[: len(members)]
    n, m = len(members), len(nonmembers)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(auc: float, *, members: int, nonmembers: int) -> tuple[float, float]:
    """95%, by Newcombe 2006 (method 5): every theta whose Hanley-McNeil variance allows this AUC.

    As in Wilson's interval, the variance is that at the bound itself, not at the estimate: for an AUC of 1
    the lower end stays below 1, while DeLong's interval has no width.

    Source: https://doi.org/10.1002/sim.2324.
    """
    star = (members + nonmembers) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)
        return (auc - theta) ** 2 - _Z95**2 * theta * (1 - theta) * spread / (members * nonmembers)

    # At 0 and 1 the variance is 0, so excess is positive there unless the AUC is 0 or 1.
    low = float(brentq(excess, 0.0, auc)) if 0 < auc < 1 else _far_end(excess, auc, toward=0.0)
    high = float(brentq(excess, auc, 1.0)) if 0 < auc < 1 else _far_end(excess, auc, toward=1.0)
    return low, high


def _far_end(excess: Callable[[float], float], auc: float, *, toward: float) -> float:
    """The end of the interval of an AUC of 0 or 1, where `excess` has a root at the estimate itself."""
    return auc if auc == toward else float(brentq(excess, toward, auc + (toward - auc) * 1e-9))


def at_rate(members: NDArray[np.float64], nonmembers: NDArray[np.float64], *, target: float) -> AtRate:
    """True positives above the lowest threshold that keeps false positives at or below the target.

    Of n non-members floor(target n) may lie above it. With fewer than 1 / target that is none: 0.1% of 64
    non-members puts the threshold above all of them, and the interval of `fpr` bounds the true false positive
    rate. Members do not set the threshold, so the interval of `tpr` is exact for it.
    """
    allowed = math.floor(target * len(nonmembers) + 1e-9)
    threshold = np.sort(nonmembers)[::-1][allowed]
    hits, false = int((members > threshold).sum()), int((nonmembers > threshold).sum())
    return AtRate(target, proportion(hits, len(members)), proportion(false, len(nonmembers)))
