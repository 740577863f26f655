"""FedAvg, local-only and centralised tuning on an engine whose arithmetic fits on a napkin."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedloom.algorithms.base import UNSENT, Algorithm, ServerState, answer
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.names import ALGORITHMS
from fedloom.algorithms.server_optimizers import SGD
from fedloom.client import Client
from fedloom.errors import ConfigError
from fedloom.federation import Federation
from fedloom.messages import ClientId
from fedloom.transport import wire
from fedloom.transport.in_process import Simulation
from tests.fakes import FOUR, A, B, ToyEngine, everybody, numbers, run_alone, state


def federate(
    clients: dict[ClientId, Any],
    *,
    rounds: int = 1,
    algorithm: Algorithm | None = None,
    engine: ToyEngine | None = None,
    width: int = 8,
) -> tuple[ServerState, dict[ClientId, Client]]:
    algorithm, engine = algorithm or FedAvg(), engine or ToyEngine()
    made = {c: xs if isinstance(xs, Client) else Client(c, xs) for c, xs in clients.items()}
    transport = Simulation(algorithm, engine, made, clients_per_batch=width)
    start = algorithm.init(engine.initial_adapter(0))
    return Federation(algorithm, transport, everybody(made)).run(start, rounds), made


def test_one_round_of_fedavg_by_hand() -> None:
    # From 0 with rate 1/2: "a" sees 4 twice: 0 -> 2 -> 3. "b" sees 8 once: 0 -> 4. (2*3 + 1*4) / 3 = 10/3.
    end, _ = federate({"a": [4.0, 4.0], "b": [8.0]})
    assert numbers(end.adapter) == pytest.approx([10 / 3, 10 / 3], rel=1e-7)


def test_two_rounds_of_fedavg_by_hand() -> None:
    # Round 1: "a" 0 -> 2, "b" 0 -> 4, mean 3. Round 2: "a" 3 -> 3.5, "b" 3 -> 5.5, mean 4.5.
    end, _ = federate({"a": [4.0], "b": [8.0]}, rounds=2)
    assert numbers(end.adapter) == [4.5, 4.5]
    assert end.round == 2


def test_fedavg_of_one_client_is_local_training() -> None:
    alone = Client("a", FOUR["a"])
    adapter = state(0.0, 0.0)
    for r in range(3):
        adapter = run_alone(alone.fit(adapter, round=r), ToyEngine()).adapter
    end, _ = federate({"a": FOUR["a"]}, rounds=3)
    # The server adds the delta back to where it started from, which may round once.
    assert numbers(end.adapter) == pytest.approx(numbers(adapter), rel=1e-6)


def test_centralised_tuning_is_fedavg_of_one_client_that_owns_everything() -> None:
    pooled = [x for xs in FOUR.values() for x in xs]
    end, clients = federate({"centralised": pooled}, rounds=2)
    assert clients["centralised"].memory == {"seen/local": 2 * len(pooled)}
    fitted = run_alone(Client("centralised", pooled).fit(state(0.0, 0.0), round=0), ToyEngine(epochs=2))
    assert numbers(end.adapter) == pytest.approx(numbers(fitted.adapter), rel=1e-6)


def test_the_order_of_clients_changes_no_bit() -> None:
    ends = {
        federate(dict(order), rounds=2)[0].adapter.sha256() for order in itertools.permutations(FOUR.items())
    }
    assert len(ends) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_width_of_a_batch_changes_no_bit(width: int) -> None:
    assert (
        federate(FOUR, rounds=2, width=width)[0].adapter.sha256()
        == federate(FOUR, rounds=2)[0].adapter.sha256()
    )


def test_the_server_learning_rate_scales_the_mean_delta() -> None:
    # The delta of one client from 0 towards 4 is 2; twice that is 4.
    end, _ = federate({"a": [4.0]}, algorithm=FedAvg(server_optimizer=SGD(lr=2.0)))
    assert numbers(end.adapter) == [4.0, 4.0]


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_a_server_learning_rate_that_learns_nothing_is_refused(lr: float) -> None:
    with pytest.raises(ConfigError, match="lr > 0"):
        SGD(lr=lr)


def test_an_update_carries_its_delta_its_size_and_three_numbers() -> None:
    update = run_alone(FedAvg().client(_broadcast(), Client("a", [4.0, 4.0], limit=1)), ToyEngine())
    assert list(update.states) == ["delta"]
    assert numbers(update.delta) == [2.0, 2.0]  # trained 2, started at 0
    assert update.delta[B].tolist() == [[1.0], [1.0]]
    assert update.weight == 2  # the examples it has, not those of this round
    assert update.metrics == {"loss": 8.0, "steps": 1, "tokens": 1}  # (0 - 4)^2 / 2


def test_local_only_lets_no_tensor_out() -> None:
    client = Client("a", [4.0])
    update = run_alone(LocalOnly().client(_broadcast(), client), ToyEngine())
    data = wire.pack_update(update)
    assert dict(update.states) == {}
    assert b"lora" not in data
    assert len(data) < 300  # a header and three numbers
    assert client.memory["adapter"][A].numpy().tobytes() not in data


def test_local_only_clients_go_on_from_their_own_adapter() -> None:
    # "a": 0 -> 2 -> 3; "b": 0 -> 4 -> 6; the server still has where it started.
    end, clients = federate({"a": [4.0], "b": [8.0]}, rounds=2, algorithm=LocalOnly())
    assert [numbers(clients[c].memory["adapter"])[0] for c in "ab"] == [3.0, 6.0]
    assert numbers(end.adapter) == [0.0, 0.0]
    assert end.round == 2


def test_local_only_clients_never_see_one_another() -> None:
    together = federate(FOUR, rounds=3, algorithm=LocalOnly())[1]
    for client, xs in FOUR.items():
        alone = federate({client: xs}, rounds=3, algorithm=LocalOnly())[1]
        assert together[client].memory["adapter"].sha256() == alone[client].memory["adapter"].sha256()


def _broadcast() -> Any:
    return FedAvg().broadcast(ServerState(state(0.0, 0.0)), "a")


def test_only_metrics_that_an_algorithm_names_are_sent_and_the_others_stay_until_the_next_answer() -> None:
    client = Client("a", [1.0])
    sent = answer(FedAvg(), client, {}, weight=1, metrics={"loss": 1.0, "dropped": 2.0})
    assert (sent.metrics, client.memory[UNSENT]) == ({"loss": 1.0}, {"dropped": 2.0})
    answer(FedAvg(), client, {}, weight=1, metrics={"loss": 1.0})
    assert UNSENT not in client.memory


def test_every_algorithm_lists_what_it_reports() -> None:
    listed = {choice: sorted(made.reports) for choice, made in ALGORITHMS.items()}
    training = ["loss", "steps", "tokens"]
    assert listed == {**dict.fromkeys(listed, training), "fewfedweight": sorted([*training, "own_loss"])}
