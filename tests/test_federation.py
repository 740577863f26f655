"""The round loop: who is left out, what is counted, when it stops."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import permutations
from typing import Any

import pytest

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local_only import LocalOnly
from fedloom.client import Client
from fedloom.errors import EmptyCohort
from fedloom.federation import WINDOW, Federation, Round
from fedloom.gate import Gate
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.selection import Poisson
from fedloom.state import AdapterState
from fedloom.transport.base import Arrival, Snapshot
from fedloom.transport.in_process import Simulation
from tests.fakes import ToyEngine, arrival, everybody, numbers, state


def federation(
    engine: ToyEngine, clients: dict[str, list[float]], seen: list[Round], select: object = None
) -> Federation:
    algorithm = FedAvg()
    transport = Simulation(algorithm, engine, {c: Client(c, xs) for c, xs in clients.items()})
    return Federation(
        algorithm,
        transport,
        select or everybody(clients),
        after_round=lambda state, round: seen.append(round),  # type: ignore[arg-type]
    )


START = ServerState(state(0.0, 0.0))


class Scripted:
    """A transport over which the same answers come in every round."""

    def __init__(self, *arrivals: Arrival):
        self.arrivals = arrivals
        self.settled: list[tuple[int, list[ClientId]]] = []

    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Arrival]:
        yield from self.arrivals

    def settle(self, round: int, used: Collection[ClientId]) -> None:
        self.settled.append((round, sorted(used)))

    def snapshot(self) -> Snapshot:
        return Snapshot()

    def restore(self, snapshot: Snapshot) -> None: ...


def answer(client: str, value: float, weight: float = 1) -> Arrival:
    return arrival(Update(client, {"delta": state(value, value)}, weight))


def run(*arrivals: Arrival, gate: Gate = Gate()) -> tuple[ServerState, Round]:
    """One round of FedAvg over whoever answers."""
    seen: list[Round] = []
    cohort = sorted({a.client for a in arrivals})
    end = Federation(
        FedAvg(), Scripted(*arrivals), everybody(cohort), lambda _, r: seen.append(r), gate=gate
    ).run(START, 1)
    return end, seen[0]


def test_the_order_of_arrival_changes_no_bit() -> None:
    chance = random.Random(0)
    answers = [answer(f"client-{i}", 10 ** chance.uniform(-3, 1), chance.randint(1, 99)) for i in range(5)]
    loose = Gate(max_norm_ratio=1e9)
    assert len({run(*order, gate=loose)[0].adapter.sha256() for order in permutations(answers)}) == 1


def test_an_update_out_of_proportion_is_left_out_as_if_it_had_never_come() -> None:
    answers = [answer(c, 1.0 + i / 10) for i, c in enumerate("abd")]
    end, seen = run(*answers, answer("c", 400.0))
    assert (seen.refused, sorted(seen.updates)) == ({"c": "norm"}, ["a", "b", "d"])
    assert end.adapter.sha256() == run(*answers)[0].adapter.sha256()


def test_a_client_that_learnt_nothing_does_not_make_the_others_out_of_proportion() -> None:
    zeros = [answer(c, 0.0) for c in "abc"]
    assert run(*zeros, answer("d", 1.0))[1].refused == {}


def test_weight_zero_is_honest_and_does_not_count() -> None:
    end, seen = run(answer("a", 8.0), answer("b", 100.0, weight=0))
    assert (numbers(end.adapter), seen.refused, seen.updates["b"].weight) == ([8.0, 8.0], {}, 0)


def test_only_those_whose_updates_were_used_are_settled() -> None:
    transport = Scripted(answer("a", 1.0), answer("b", math.nan), answer("c", 1.0), answer("d", 500.0))
    Federation(FedAvg(), transport, everybody(["a", "b", "c", "d"])).run(START, 1)
    assert transport.settled[0] == (0, ["a", "c"])


def test_no_more_updates_are_held_at_a_time_than_the_window_has_room_for() -> None:
    alive, most = 0, 0

    class Counted(AdapterState):
        def __init__(self, tensors: Mapping[str, Any]):
            nonlocal alive, most
            super().__init__(tensors)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def made(client: str) -> Arrival:
        return Arrival(client, 10, 10, lambda: Update(client, {"delta": Counted(state(1.0, 1.0))}, 1))

    run(*(made(f"client-{i:03d}") for i in range(300)))
    assert most <= WINDOW + 3  # the first, one arriving, one being folded


def test_an_algorithm_that_looks_at_no_update_has_its_clients_work_all_the_same() -> None:
    engine, clients = ToyEngine(), {c: Client(c, [1.0]) for c in "ab"}
    transport = Simulation(LocalOnly(), engine, clients, clients_per_batch=1)
    Federation(LocalOnly(), transport, everybody(["a", "b"])).run(START, 1)
    assert [sorted(c.memory) for c in clients.values()] == [["adapter", "seen/local"]] * 2


def test_a_diverged_client_is_left_out_and_the_round_goes_on() -> None:
    seen: list[Round] = []
    engine = ToyEngine(poison={"b": math.nan})
    end = federation(engine, {"a": [4.0], "b": [8.0], "c": [6.0]}, seen).run(START, 1)
    assert seen[0].refused == {"b": "non-finite"}
    assert sorted(seen[0].updates) == ["a", "c"]
    assert numbers(end.adapter) == [2.5, 2.5]  # (2 + 3) / 2, without b


def test_when_everybody_is_refused_the_message_counts_and_advises() -> None:
    engine = ToyEngine(poison={"a": math.nan, "b": math.inf})
    with pytest.raises(
        EmptyCohort, match=r"Round 1: none of 2 .* \(2 x non-finite\)\. .* lower local.learning_rate"
    ) as said:
        federation(engine, {"a": [4.0], "b": [8.0]}, []).run(START, 1)
    assert "\n" not in str(said.value)


def test_when_nobody_answers_the_message_says_so() -> None:
    with pytest.raises(EmptyCohort, match=r"none of 1 .* \(none arrived\)"):
        Federation(FedAvg(), Scripted(), everybody(["a"])).run(START, 1)


def test_a_second_answer_of_one_client_does_not_count() -> None:
    twice = Scripted(*(arrival(Update("a", {"delta": state(x, x)}, 1)) for x in (1.0, 100.0)))
    seen: list[Round] = []
    end = Federation(FedAvg(), twice, everybody(["a"]), lambda _, round: seen.append(round)).run(START, 1)
    assert numbers(end.adapter) == [1.0, 1.0]
    assert seen[0].refused == {"a": "duplicate"}
    assert (seen[0].bytes_up, seen[0].bytes_down) == (20, 40)  # it travelled all the same


def test_a_round_in_which_nobody_was_drawn_changes_nothing_but_its_number() -> None:
    seen: list[Round] = []
    engine = ToyEngine()
    end = federation(engine, {"a": [4.0]}, seen, select=lambda round: []).run(START, 2)
    assert (numbers(end.adapter), end.round, engine.sent) == ([0.0, 0.0], 2, [])
    assert [r.cohort for r in seen] == [[], []]


def test_poisson_cohorts_of_every_size_run_through() -> None:
    clients = {c: [float(i)] for i, c in enumerate("abcd")}
    seen: list[Round] = []
    federation(ToyEngine(), clients, seen, partial(Poisson(rate=0.3), sorted(clients), 1)).run(START, 20)
    sizes = [len(r.updates) for r in seen]
    assert sizes == [len(r.cohort) for r in seen]
    assert min(sizes) == 0 < max(sizes)


def test_a_resumed_state_runs_the_rounds_that_are_left() -> None:
    seen: list[Round] = []
    federation(ToyEngine(), {"a": [4.0]}, seen).run(ServerState(state(0.0, 0.0), round=2), 5)
    assert [r.round for r in seen] == [2, 3, 4]


def test_progress_is_told_after_every_client() -> None:
    told: list[tuple[str, int]] = []
    algorithm = FedAvg()
    clients = {c: Client(c, [1.0]) for c in "ab"}
    Federation(
        algorithm,
        Simulation(algorithm, ToyEngine(), clients),
        everybody(["a", "b"]),
        on_update=lambda round, client: told.append((client, len(round.updates))),
    ).run(START, 1)
    assert told == [("a", 1), ("b", 2)]
