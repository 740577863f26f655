"""Cohorts are a pure function of (seed, round)."""

from __future__ import annotations

from collections import Counter

import pytest

from fedloom.errors import ConfigError
from fedloom.selection import SELECTORS, All, Fixed, Fraction, Poisson, RoundRobin

CLIENTS = tuple(f"client-{i:03d}" for i in range(20))
OPTIONS = {
    "all": {},
    "fixed": {"count": 5},
    "fraction": {"fraction": 0.25},
    "round_robin": {"count": 5},
    "poisson": {"rate": 0.3},
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_the_same_seed_and_round_select_the_same_cohort(kind):
    one, two = (SELECTORS[kind](CLIENTS, 7, **OPTIONS[kind]) for _ in range(2))
    two(0)  # a call in between must not matter
    assert [one(r) for r in range(10)] == [two(r) for r in range(10)]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_cohort_does_not_depend_on_the_order_in_which_clients_are_listed(kind):
    forward, backward = (SELECTORS[kind](clients, 7, **OPTIONS[kind]) for clients in (CLIENTS, CLIENTS[::-1]))
    assert [forward(r) for r in range(10)] == [backward(r) for r in range(10)]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_cohort_is_sorted_and_names_known_clients_once(kind):
    for r in range(20):
        cohort = SELECTORS[kind](CLIENTS, 7, **OPTIONS[kind])(r)
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(CLIENTS)


@pytest.mark.parametrize("kind", sorted(SELECTORS.keys() - {"all"}))
def test_another_run_seed_selects_other_cohorts(kind):
    one, two = (SELECTORS[kind](CLIENTS, seed, **OPTIONS[kind]) for seed in (0, 1))
    assert [one(r) for r in range(5)] != [two(r) for r in range(5)]


@pytest.mark.parametrize("kind", sorted(SELECTORS.keys() - {"all"}))
def test_rounds_differ(kind):
    select = SELECTORS[kind](CLIENTS, 0, **OPTIONS[kind])
    assert len({tuple(select(r)) for r in range(4)}) > 1


def test_all_selects_everybody():
    assert All(CLIENTS[::-1])(3) == list(CLIENTS)


def test_fixed_selects_every_client_equally_often_in_the_long_run():
    times = Counter(c for r in range(2000) for c in Fixed(CLIENTS, 0, count=5)(r))
    # 2000 rounds * 5/20 = 500 expected, standard deviation sqrt(2000 * 0.25 * 0.75) = 19.4
    assert all(abs(times[c] - 500) < 5 * 19.4 for c in CLIENTS)


def test_fraction_rounds_down_without_losing_a_client_to_floating_point():
    hundred = tuple(f"c{i}" for i in range(100))
    assert len(Fraction(hundred, fraction=0.29)(0)) == 29  # 0.29 * 100 == 28.999999999999996


def test_fraction_selects_at_least_one_client():
    assert len(Fraction(CLIENTS[:3], fraction=0.05)(0)) == 1


def test_round_robin_visits_everybody_equally_often_when_count_does_not_divide_the_clients():
    select = RoundRobin(CLIENTS[:7], 3, count=3)
    assert set(Counter(c for r in range(7) for c in select(r)).values()) == {3}


def test_round_robin_repeats_nobody_before_everybody_had_a_turn():
    select = RoundRobin(CLIENTS, 3, count=5)
    assert sorted(c for r in range(4) for c in select(r)) == list(CLIENTS)


def test_poisson_cohorts_vary_in_size_around_the_rate():
    sizes = [len(Poisson(CLIENTS, 0, rate=0.3)(r)) for r in range(1000)]
    # mean 20 * 0.3 = 6; standard error sqrt(20 * 0.3 * 0.7 / 1000) = 0.065
    assert len(set(sizes)) > 5
    assert abs(sum(sizes) / 1000 - 6) < 5 * 0.065


def test_a_poisson_cohort_may_be_empty():
    assert any(Poisson(CLIENTS[:2], 0, rate=0.1)(r) == [] for r in range(20))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: All(()), "at least one client"),
        (lambda: All(("a", "b", "a")), "'a' is listed twice"),
        (lambda: Fixed(CLIENTS, count=21), "the 20 clients there are, got count=21"),
        (lambda: Fixed(CLIENTS, count=0), "got count=0"),
        (lambda: RoundRobin(CLIENTS, count=0), "got count=0"),
        (lambda: Fraction(CLIENTS, fraction=0.0), "fraction=0.0"),
        (lambda: Fraction(CLIENTS, fraction=1.5), "fraction=1.5"),
        (lambda: Poisson(CLIENTS, rate=-0.1), "rate=-0.1"),
        (lambda: Poisson(CLIENTS, rate=float("nan")), "rate=nan"),
    ],
)
def test_an_impossible_selector_is_refused_when_it_is_built(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
