"""The round loop: who is left out, what is counted, when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.errors import EmptyCohort
from fedloom.federation import Federation, Round
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.selection import All, Poisson
from fedloom.transport.base import Delivery
from fedloom.transport.in_process import InProcess
from tests.fakes import ToyEngine, numbers, state


def federation(
    engine: ToyEngine, clients: dict[str, list[float]], seen: list[Round], select: object = None
) -> Federation:
    algorithm = FedAvg()
    transport = InProcess(algorithm, engine, {c: Client(c, xs) for c, xs in clients.items()})
    return Federation(
        algorithm,
        transport,
        select or All(sorted(clients)),
        after_round=lambda state, round: seen.append(round),  # type: ignore[arg-type]
    )


START = ServerState(state(0.0, 0.0))


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
    class Silent:
        def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Delivery]:
            return iter(())

    with pytest.raises(EmptyCohort, match=r"none of 1 .* \(none arrived\)"):
        Federation(FedAvg(), Silent(), All(["a"])).run(START, 1)


def test_a_second_answer_of_one_client_does_not_count() -> None:
    class Twice:
        def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Delivery]:
            for value in (1.0, 100.0):
                yield Delivery(Update("a", {"delta": state(value, value)}, 1), 10, 20)

    seen: list[Round] = []
    end = Federation(FedAvg(), Twice(), All(["a"]), lambda _, round: seen.append(round)).run(START, 1)
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
    federation(ToyEngine(), clients, seen, Poisson(sorted(clients), seed=1, rate=0.3)).run(START, 20)
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
        InProcess(algorithm, ToyEngine(), clients),
        All(["a", "b"]),
        on_update=lambda round, client: told.append((client, len(round.updates))),
    ).run(START, 1)
    assert told == [("a", 1), ("b", 2)]
