"""A client goes on in its own data where its last round stopped."""

from __future__ import annotations

import pytest

from fedloom.client import Client
from fedloom.steps import Fit, Fitted, LocalTraining
from tests.fakes import ToyEngine, run_alone, state


def fit_of(client: Client, engine: ToyEngine, **options: object) -> tuple[Fit, Fitted]:
    fitted = run_alone(client.fit(state(0.0, 0.0), round=0, **options), engine)  # type: ignore[arg-type]
    return engine.sent[-1]["only"], fitted


def test_the_second_round_starts_where_the_first_ended() -> None:
    client, engine = Client("c", [1.0, 2.0, 3.0], limit=2), ToyEngine()
    seen = [fit_of(client, engine)[0].seen for _ in range(3)]
    assert seen == [0, 2, 4]
    assert client.memory == {"seen/local": 6}


def test_two_rounds_see_the_same_examples_as_one_of_twice_the_length() -> None:
    twice = Client("c", [1.0, 2.0, 3.0], limit=2)
    start = state(0.0, 0.0)
    half = run_alone(twice.fit(start, round=0), ToyEngine()).adapter
    whole = run_alone(twice.fit(half, round=1), ToyEngine()).adapter
    once = run_alone(Client("c", [1.0, 2.0, 3.0], limit=4).fit(start, round=0), ToyEngine()).adapter
    assert whole[next(iter(whole))].tolist() == once[next(iter(once))].tolist()


def test_two_jobs_of_one_client_each_keep_their_own_order() -> None:
    client, engine = Client("c", [1.0, 2.0], limit=1), ToyEngine()
    public, _ = fit_of(client, engine, purpose="public")
    private, _ = fit_of(client, engine, purpose="private")
    assert (public.stream, public.seen) == (("c", "public"), 0)
    assert (private.stream, private.seen) == (("c", "private"), 0)
    assert client.memory == {"seen/public": 1, "seen/private": 1}


def test_other_examples_may_be_trained_on() -> None:
    fit, _ = fit_of(Client("c", [1.0]), ToyEngine(), examples=[5.0, 6.0])
    assert list(fit.examples) == [5.0, 6.0]


def test_a_fit_has_the_clients_seed_and_its_rounds_learning_rate() -> None:
    local = LocalTraining(learning_rate=1.0, schedule="cosine", rounds=10)
    client, engine = Client("c", [1.0], local=local, seed=7), ToyEngine()
    run_alone(client.fit(state(0.0, 0.0), round=5), engine)
    fit = engine.sent[-1]["only"]
    assert (fit.seed, fit.local.schedule) == (7, "constant")
    assert fit.local.learning_rate == pytest.approx(0.5)  # half-way down the cosine


def test_a_staged_copy_can_be_thrown_away() -> None:
    client = Client("c", [1.0], memory={"seen/local": 3})
    staged = client.staged()
    staged.memory["seen/local"] = 99
    staged.memory["adapter"] = state(1.0)
    assert client.memory == {"seen/local": 3}
