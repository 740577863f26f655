"""A lower bound on epsilon from one training run: too many right guesses refute a claim of privacy.

For each of m canaries a fair coin decides whether it enters training. Afterwards an attacker scores them,
guesses "in" for the r best, and is right v times. Under (epsilon, delta)-DP a guess is right with probability
at most q = e^epsilon / (1 + e^epsilon), whatever the other guesses, plus what delta allows. An epsilon under
which v or more right guesses are too unlikely is refuted.

Source: Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846, theorem 5.2,
one-sided (no guess "out").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedloom.errors import ConfigError, DataError


@dataclass(frozen=True)
class OneRun:
    """`epsilon` and every smaller one are refuted with confidence 1 - alpha; 0: none is."""

    epsilon: float
    guesses: int  # of the largest bound
    correct: int
    canaries: int
    tried: int  # how many numbers of guesses alpha was split between
    delta: float
    alpha: float

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def one_run(
    included: Sequence[float],
    excluded: Sequence[float],
    *,
    guesses: Sequence[int],
    delta: float,
    alpha: float = 0.05,
) -> OneRun:
    """From canaries' scores, which are higher the more the attacker believes in "in".

    Fix `guesses` before seeing any score; of several numbers the best counts, and alpha is split
    between them. m/4 is a fair single choice. Ties count against the attacker. The bound holds for
    canaries that fair coins put in or out; a split fixed at exactly half comes close.
    """
    inside = _sorted_together(included, excluded)  # (m,) best first
    m = len(inside)
    if not guesses or not all(1 <= r <= m for r in guesses):
        raise ConfigError(f"Expected numbers of guesses between 1 and {m}, got {list(guesses)}.")
    tries = [(r, int(inside[:r].sum())) for r in sorted(set(guesses))]
    return _best(tries, m=m, delta=delta, alpha=alpha)


def epsilon_lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, alpha: float = 0.05, above: float = 0.0
) -> float:
    """The largest epsilon that this many right guesses refute; `above` if they refute none above it."""
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(f"Expected {correct=} <= {guesses=} <= {canaries=}, none below 0.")
    if not 0 <= delta <= 1 or not 0 < alpha < 1:
        raise ConfigError(f"Expected {delta=} in [0, 1] and {alpha=} in (0, 1).")

    def refuted(epsilon: float) -> bool:
        shape = {"canaries": canaries, "guesses": guesses, "correct": correct}
        # The tail without delta is cheap, and never above the whole.
        return all(p_value(epsilon, delta=d, **shape) < alpha for d in (0.0, delta))

    if not refuted(above):
        return above
    low, high = above, max(1.0, 2 * above)
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-7 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(epsilon: float, *, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """The largest possible P[at least `correct` right] under (epsilon, delta)-DP."""
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, q))
    if delta == 0 or correct == 0:
        return tail
    fewer = np.arange(1, correct + 1)
    gained = stats.binom.sf(correct - fewer - 1, guesses, q) - tail  # P[v - i <= right < v]
    return min(1.0, tail + 2 * canaries * delta * float(np.max(gained / fewer)))


def ceiling(guesses: int, *, delta: float, alpha: float = 0.05, canaries: int | None = None) -> float:
    """The bound if every guess is right: no attack with this many guesses can show more."""
    m = guesses if canaries is None else canaries
    return epsilon_lower_bound(canaries=m, guesses=guesses, correct=guesses, delta=delta, alpha=alpha)


def _best(tries: Sequence[tuple[int, int]], *, m: int, delta: float, alpha: float) -> OneRun:
    """The largest bound of (guesses, right ones), each at its share of alpha."""
    found, r, v = 0.0, *tries[0]
    for guesses, correct in sorted(tries, key=_promise, reverse=True):
        if correct * (1 + math.exp(-found)) <= guesses:
            continue  # right less often than the current bound allows: cannot raise it
        bound = epsilon_lower_bound(
            canaries=m, guesses=guesses, correct=correct, delta=delta, alpha=alpha / len(tries), above=found
        )
        if bound > found:
            found, r, v = bound, guesses, correct
    return OneRun(found, r, v, m, len(tries), delta, alpha)


def _promise(attempt: tuple[int, int]) -> float:
    """The share of right guesses less one standard error: bounds are computed in this order."""
    guesses, correct = attempt
    return (correct - math.sqrt(guesses)) / guesses if guesses else -math.inf


def _sorted_together(included: Sequence[float], excluded: Sequence[float]) -> NDArray[np.bool_]:
    """Whether each canary was in, best score first. Among equal scores those that were out come first."""
    scores = np.concatenate([np.asarray(included, float), np.asarray(excluded, float)])
    if not len(included) or not len(excluded):
        raise DataError(f"Expected canaries in and out, got {len(included)} in and {len(excluded)} out.")
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} canaries have no score: the model answers NaN.")
    inside = np.arange(len(scores)) < len(included)
    order: NDArray[np.bool_] = inside[np.lexsort((inside, -scores))]
    return order
