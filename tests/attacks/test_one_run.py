from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedloom.attacks.one_run import ceiling, epsilon_lower_bound, one_run, p_value
from fedloom.errors import ConfigError, DataError
from fedloom.statistics import proportion


def gaussian(n: int, *, shift: float = 0.0) -> np.ndarray:
    """n quantiles of a normal distribution: a sample without chance."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n) + shift


def corners(included: np.ndarray, excluded: np.ndarray) -> list[int]:
    """Numbers of guesses at the corners of the ROC's convex hull, which JAX Privacy's auditor tries by default."""
    inside = np.arange(len(included) + len(excluded)) < len(included)
    right = np.concatenate([[0], np.cumsum(inside[np.argsort(-np.concatenate([included, excluded]))])])
    wrong = np.arange(len(right)) - right
    hull: list[int] = []
    for i in range(len(right)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (wrong[b] - wrong[a]) * (right[i] - right[a]) < (right[b] - right[a]) * (wrong[i] - wrong[a]):
                break
            hull.pop()
        hull.append(i)
    return hull[1:]  # without that of no guess


@pytest.mark.parametrize(("shift", "epsilon"), [(0, 0.0), (1, 1.13346), (2, 2.311945), (4, 4.395568)])
def test_the_bound_agrees_with_jax_privacy_on_its_own_guesses(shift: float, epsilon: float) -> None:
    """google-deepmind/jax_privacy, tests/auditing_test.py: test_epsilon_one_run_close, to its own tolerance."""
    inside, outside = gaussian(10_000, shift=shift), gaussian(10_000)
    guesses = corners(inside, outside)
    # It splits alpha between one more: the corner of no guess.
    alpha = 0.05 * len(guesses) / (len(guesses) + 1)
    found = one_run(inside, outside, guesses=guesses, delta=1e-6, alpha=alpha)
    assert found.epsilon == pytest.approx(epsilon, rel=1e-5)


@pytest.mark.parametrize(
    ("guesses", "epsilon"),
    [(10, 1.05), (20, 1.82), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10), (1000, 5.78), (2000, 6.45)],
)
def test_so_many_right_guesses_show_no_more_than_this(guesses: int, epsilon: float) -> None:
    assert ceiling(guesses, delta=1e-5) == pytest.approx(epsilon, abs=0.005)


def test_without_delta_the_ceiling_has_a_closed_form() -> None:
    """All r right has probability q^r; q^r = alpha gives epsilon = ln(q / (1 - q)). r = 50: 2.78."""
    q = 0.05 ** (1 / 50)
    assert ceiling(50, delta=0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_the_p_value_is_the_sum_in_the_paper() -> None:
    m, r, v, epsilon, delta = 40, 12, 9, 0.7, 1e-3
    law = stats.binom(r, 1 / (1 + math.exp(-epsilon)))
    tail = sum(law.pmf(k) for k in range(v, r + 1))
    slope = max(sum(law.pmf(k) for k in range(v - i, v)) / i for i in range(1, v + 1))
    found = p_value(epsilon, canaries=m, guesses=r, correct=v, delta=delta)
    assert found == pytest.approx(tail + 2 * m * delta * slope, rel=1e-12)


def test_the_bound_is_where_the_p_value_meets_alpha() -> None:
    shape = {"canaries": 300, "guesses": 80, "correct": 74, "delta": 1e-5}
    assert p_value(epsilon_lower_bound(**shape), **shape) == pytest.approx(0.05, abs=1e-6)


def test_half_right_refutes_nothing() -> None:
    assert epsilon_lower_bound(canaries=100, guesses=100, correct=50, delta=1e-5) == 0.0


def test_a_larger_delta_refutes_less() -> None:
    found = [
        epsilon_lower_bound(canaries=200, guesses=50, correct=49, delta=d) for d in (0.0, 1e-4, 1e-3, 1.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0.0  # delta 1 promises nothing


def test_alpha_is_split_between_numbers_of_guesses() -> None:
    inside, outside = [3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3], [0.0] * 8
    found = one_run(inside, outside, guesses=[4, 8], delta=0.0)
    alone = epsilon_lower_bound(canaries=16, guesses=8, correct=8, delta=0.0, alpha=0.025)
    assert (found.guesses, found.correct, found.canaries, found.tried) == (8, 8, 16, 2)
    assert found.epsilon == pytest.approx(alone)


def test_ties_count_against_the_attacker() -> None:
    found = one_run([1.0] * 20, [1.0] * 20, guesses=[20], delta=0.0)
    assert (found.epsilon, found.correct) == (0.0, 0)


def test_chance_refutes_no_privacy_more_often_than_alpha() -> None:
    """300 audits of scores that know nothing: at most 5% + 3 standard errors, 26, are false alarms."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        coin, scores = rng.random(200) < 0.5, rng.normal(size=200)
        alarms += one_run(scores[coin], scores[~coin], guesses=[12, 25, 50], delta=1e-5).epsilon > 0
    assert alarms <= 26


def test_epsilon_of_a_laplace_mechanism_is_not_overstated() -> None:
    """Scores of exact epsilon 1: at most 5% + 3 standard errors of 200 bounds, 19, lie above it."""
    rng = np.random.default_rng(1)
    above = 0
    for _ in range(200):
        coin = rng.random(400) < 0.5
        scores = coin + rng.laplace(size=400)
        above += one_run(scores[coin], scores[~coin], guesses=[100], delta=0.0).epsilon > 1
    assert above <= 19


def test_noise_four_times_too_small_is_caught() -> None:
    """The claim is epsilon 1 (Laplace noise of scale 1); the noise has scale 1/4, so epsilon is 4."""
    rng = np.random.default_rng(2)
    coin = rng.random(1000) < 0.5
    scores = coin + rng.laplace(size=1000) / 4
    assert one_run(scores[coin], scores[~coin], guesses=[250], delta=1e-5).epsilon > 1.0


@pytest.mark.parametrize("guesses", [[], [0], [5]])
def test_numbers_of_guesses_that_do_not_fit_are_refused(guesses: list[int]) -> None:
    with pytest.raises(ConfigError, match="between 1 and 4"):
        one_run([1.0, 2.0], [0.0, 1.0], guesses=guesses, delta=0.0)


def test_a_model_that_answers_nan_is_refused() -> None:
    with pytest.raises(DataError, match="1 canaries have no score"):
        one_run([math.nan], [0.0], guesses=[1], delta=0.0)


def test_only_in_or_only_out_is_refused() -> None:
    with pytest.raises(DataError, match="0 out"):
        one_run([1.0], [], guesses=[1], delta=0.0)


def test_a_proportion_of_none_or_all_has_an_interval() -> None:
    """No hit in 100: the upper end is 1 - 0.025^(1/100) = 3.62%."""
    assert proportion(0, 100).ci95 == pytest.approx((0.0, 1 - 0.025**0.01))
    assert proportion(100, 100).ci95 == pytest.approx((0.025**0.01, 1.0))
    assert proportion(5, 10).ci95 == pytest.approx((0.18709, 0.81291), abs=1e-5)
