"""Cohorts are a pure function of (clients, seed, round)."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from fedloom.errors import ConfigError
from fedloom.selection import SELECTORS, All, Fraction, Poisson, RoundRobin, Uniform

CLIENTS = tuple(f"client-{i:03d}" for i in range(20))
OPTIONS = {
    "all": {},
    "uniform": {"count": 5},
    "fraction": {"fraction": 0.25},
    "round_robin": {"count": 5},
    "poisson": {"rate": 0.3},
}


def over(kind, clients, seed):
    return partial(SELECTORS[kind](**OPTIONS[kind]), clients, seed)


@pytest.mark.parametrize("kind", SELECTORS)
def test_the_same_seed_and_round_select_the_same_cohort(kind):
    one, two = (over(kind, CLIENTS, 7) for _ in range(2))
    two(0)  # a call in between must not matter
    assert [one(r) for r in range(10)] == [two(r) for r in range(10)]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_cohort_does_not_depend_on_the_order_in_which_clients_are_listed(kind):
    forward, backward = (over(kind, clients, 7) for clients in (CLIENTS, CLIENTS[::-1]))
    assert [forward(r) for r in range(10)] == [backward(r) for r in range(10)]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_cohort_is_sorted_and_names_known_clients_once(kind):
    for r in range(20):
        cohort = over(kind, CLIENTS, 7)(r)
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(CLIENTS)


@pytest.mark.parametrize("kind", sorted(SELECTORS.keys() - {"all"}))
def test_another_run_seed_selects_other_cohorts(kind):
    one, two = (over(kind, CLIENTS, seed) for seed in (0, 1))
    assert [one(r) for r in range(5)] != [two(r) for r in range(5)]


@pytest.mark.parametrize("kind", sorted(SELECTORS.keys() - {"all"}))
def test_rounds_differ(kind):
    select = over(kind, CLIENTS, 0)
    assert len({tuple(select(r)) for r in range(4)}) > 1


def test_all_selects_everybody():
    assert All()(CLIENTS[::-1], 0, 3) == list(CLIENTS)


def test_uniform_selects_every_client_equally_often_in_the_long_run():
    times = Counter(c for r in range(2000) for c in Uniform(5)(CLIENTS, 0, r))
    # 2000 rounds * 5/20 = 500 expected, standard deviation sqrt(2000 * 0.25 * 0.75) = 19.4
    assert all(abs(times[c] - 500) < 5 * 19.4 for c in CLIENTS)


def test_fraction_rounds_down_without_losing_a_client_to_floating_point():
    hundred = tuple(f"c{i}" for i in range(100))
    assert len(Fraction(0.29)(hundred, 0, 0)) == 29  # 0.29 * 100 == 28.999999999999996


def test_fraction_selects_at_least_one_client():
    assert len(Fraction(0.05)(CLIENTS[:3], 0, 0)) == 1


def test_round_robin_visits_everybody_equally_often_when_count_does_not_divide_the_clients():
    select = partial(RoundRobin(3), CLIENTS[:7], 3)
    assert set(Counter(c for r in range(7) for c in select(r)).values()) == {3}


def test_round_robin_repeats_nobody_before_everybody_had_a_turn():
    select = partial(RoundRobin(5), CLIENTS, 3)
    assert sorted(c for r in range(4) for c in select(r)) == list(CLIENTS)


def test_poisson_cohorts_vary_in_size_around_the_rate():
    sizes = [len(Poisson(0.3)(CLIENTS, 0, r)) for r in range(1000)]
    # mean 20 * 0.3 = 6; standard error sqrt(20 * 0.3 * 0.7 / 1000) = 0.065
    assert len(set(sizes)) > 5
    assert abs(sum(sizes) / 1000 - 6) < 5 * 0.065


def test_a_poisson_cohort_may_be_empty():
    assert any(Poisson(0.1)(CLIENTS[:2], 0, r) == [] for r in range(20))


@pytest.mark.parametrize(
    ("selector", "clients", "message"),
    [
        (All(), (), "at least one client"),
        (All(), ("a", "b", "a"), "'a' is listed twice"),
        (Uniform(21), CLIENTS, "between 1 and 20, the number of clients, got count=21"),
        (Uniform(0), CLIENTS, "got count=0"),
        (RoundRobin(0), CLIENTS, "got count=0"),
    ],
)
def test_clients_that_cannot_be_selected_from_are_refused(selector, clients, message):
    with pytest.raises(ConfigError, match=message):
        selector(clients, 0, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Fraction(0.0), "fraction=0.0"),
        (lambda: Fraction(1.5), "fraction=1.5"),
        (lambda: Poisson(-0.1), "rate=-0.1"),
        (lambda: Poisson(float("nan")), "rate=nan"),
    ],
)
def test_an_impossible_selector_is_refused_when_it_is_built(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
