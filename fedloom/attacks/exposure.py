"""Exposure: how high a model ranks a planted secret among secrets that it never saw.

A canary is a text with a random secret; references are the same text with other secrets, drawn alike.
exposure = log2 |R| - log2 rank, in bits, at most log2 |R|. A model that never saw the canary gives it every
rank with equal probability: then P[exposure >= x] <= 2^-x, its mean is at most 1 / ln 2 = 1.4427 bits, and so
is its standard deviation. That holds for the untuned base too, as long as secrets are random; a model's
general preference for some digits does not matter.

Source: Carlini et al. 2019, The Secret Sharer, https://arxiv.org/abs/1802.08232.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedloom.data.example import Example
from fedloom.errors import DataError, ModelError
from fedloom.state import AdapterState
from fedloom.steps import Engine, Score, Scored

Row = TypeVar("Row", bound=Hashable)

CHANCE = 1 / math.log(2)  # bits: mean and standard deviation of the exposure of an unseen secret
_STEEPEST = 2.0**-50  # smallest value of a distribution function; below it a double's digits are noise


@dataclass(frozen=True)
class Pool:
    """Canaries of one template, and the references among which all of them are ranked."""

    planted: Sequence[Example]
    held_out: Sequence[Example]  # twins of the planted ones, drawn alike but never trained on
    references: Sequence[Example]


@dataclass(frozen=True)
class Exposed:
    """Canaries of one kind, in the caller's order, pool after pool."""

    bits: tuple[float, ...]
    extrapolated: tuple[float | None, ...]  # by a skew-normal fitted to the references; None: none fits
    mean: float | None  # of `bits`; None without canaries
    bound: float | None  # `no_leak_bound`
    p_value: float | None  # of a mean at least this large, had no canary been seen

    @property
    def leaks(self) -> bool:
        return self.mean is not None and self.bound is not None and self.mean > self.bound


@dataclass(frozen=True)
class Exposure:
    """One adapter's exposure, by one score. `held_out` is the control: it should not leak."""

    planted: Exposed
    held_out: Exposed
    references: int  # of the smallest pool
    ceiling: float  # log2 of that: the largest exposure possible there

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"leaks": self.planted.leaks}


def exposures(
    engine: Engine, pools: Sequence[Pool], adapters: Mapping[Row, AdapterState | None]
) -> dict[Row, dict[str, Exposure]]:
    """Several adapters in shared batches: row -> score -> exposure. References are scored once per adapter.

    The scores are "loss", in nats summed over the labelled tokens, and "calibrated", that minus the base's,
    so that neither a canary that is likely anyway nor a set of canaries that drew likelier secrets passes for
    learnt. The base calibrates to 0 everywhere: all ties, hence 0 bits.

    References that equal a canary are left out. Canaries of one pool share its references, so their ranks
    depend on each other slightly, the less the larger the pool.
    """
    if not pools:
        raise DataError("Expected at least one pool of canaries, got none.")
    sides = [(list(pool.planted), list(pool.held_out), _others(pool)) for pool in pools]
    examples = [e for side in sides for part in side for e in part]
    ends = np.cumsum([len(part) for side in sides for part in side])[:-1]
    base = object()
    requests: dict[Hashable, Score] = {base: Score(examples)}
    answers = engine.answer(
        requests | {row: Score(examples, a) for row, a in adapters.items() if a is not None}
    )
    untuned = _losses(answers[base])
    found: dict[Row, dict[str, Exposure]] = {}
    for row, adapter in adapters.items():
        losses = untuned if adapter is None else _losses(answers[row])
        found[row] = {
            name: _exposure(np.split(scores, ends))
            for name, scores in (("loss", losses), ("calibrated", losses - untuned))
        }
    return found


def exposure_by_rank(loss: float, references: Sequence[float] | NDArray[np.float64]) -> float:
    """In bits. rank = 1 + the number of references with a loss no higher: ties count as not known."""
    return math.log2(len(references)) - math.log2(1 + int((np.asarray(references) <= loss).sum()))


def exposures_by_extrapolation(
    losses: Sequence[float] | NDArray[np.float64], references: Sequence[float] | NDArray[np.float64]
) -> list[float | None]:
    """In bits, beyond log2 |R| too: -log2 of the CDF of a skew-normal fitted to the references.

    A guess about an unobserved tail, useful only to tell apart canaries that rank first. At most 50 bits.
    None if references do not vary or the fit fails.
    """
    references = np.asarray(references, float)
    if len(references) < 3 or references.std() <= 1e-9 * max(1.0, float(np.abs(references).max())):
        return [None] * len(losses)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the fit tries shapes at which densities overflow
        try:
            below = stats.skewnorm.cdf(losses, *stats.skewnorm.fit(references))
        except stats.FitError:
            return [None] * len(losses)
    return [None if math.isnan(p) else max(0.0, -math.log2(max(p, _STEEPEST))) for p in below.tolist()]


def no_leak_bound(canaries: int) -> float:
    """The mean exposure, in bits, that this many unseen canaries exceed about once in 20 times: 1.74 for 64.

    It is chance's mean plus 1.645 of its standard errors. The mean of few canaries has a skewed distribution,
    so they exceed it slightly more often: 8 in 6.5% of cases, 64 in 5.7%. `p_value` uses the distribution
    itself.
    """
    return CHANCE * (1 + 1.645 / math.sqrt(canaries))


def p_value(bits: Sequence[float]) -> float:
    """How often unseen canaries' mean is at least this, if exposures are independent and exponential."""
    return float(stats.gamma.sf(sum(bits) / CHANCE, len(bits)))


def _others(pool: Pool) -> list[Example]:
    secrets = {_content(e) for e in (*pool.planted, *pool.held_out)}
    found = [e for e in pool.references if _content(e) not in secrets]
    if not found:
        raise DataError(f"None of {len(pool.references)} references differs from all canaries: draw more.")
    return found


def _content(example: Example) -> tuple[str, str, str]:
    return example.instruction, example.context, example.response


def _losses(scored: Sequence[Scored]) -> NDArray[np.float64]:
    """(n,) nats, summed over an example's labelled tokens: minus the log of its probability."""
    losses = np.array([one.nll for one in scored])
    if np.isnan(losses).any():
        raise ModelError("A loss is NaN: the adapter has diverged and cannot be attacked.")
    return losses


def _exposure(parts: Sequence[NDArray[np.float64]]) -> Exposure:
    """`parts` are (planted, held out, references) of each pool in turn."""
    bits: tuple[list[float], list[float]] = ([], [])
    further: tuple[list[float | None], list[float | None]] = ([], [])
    for start in range(0, len(parts), 3):
        planted, held_out, references = parts[start : start + 3]
        beyond = exposures_by_extrapolation(np.concatenate([planted, held_out]), references)
        for side, losses, tail in (
            (0, planted, beyond[: len(planted)]),
            (1, held_out, beyond[len(planted) :]),
        ):
            bits[side].extend(exposure_by_rank(loss, references) for loss in losses.tolist())
            further[side].extend(tail)
    smallest = min(len(references) for references in parts[2::3])
    return Exposure(
        _exposed(bits[0], further[0]), _exposed(bits[1], further[1]), smallest, math.log2(smallest)
    )


def _exposed(bits: Sequence[float], extrapolated: Sequence[float | None]) -> Exposed:
    if not bits:
        return Exposed((), (), None, None, None)
    return Exposed(tuple(bits), tuple(extrapolated), fmean(bits), no_leak_bound(len(bits)), p_value(bits))
