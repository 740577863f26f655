"""Simulation sends real bytes, and keeps a client's memory only once its update has left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pytest

from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.messages import Broadcast, Update
from fedloom.steps import Steps
from fedloom.transport import wire
from fedloom.transport.in_process import InProcess
from tests.fakes import FOUR, ToyEngine, state


def transport(engine: Any, *, width: int = 8) -> InProcess:
    return InProcess(FedAvg(), engine, {c: Client(c, xs) for c, xs in FOUR.items()}, width)


def broadcasts() -> dict[str, Broadcast]:
    return {c: Broadcast(0, {"adapter": state(0.0, 0.0)}) for c in FOUR}


def test_bytes_are_those_of_the_packed_messages() -> None:
    for delivery in transport(ToyEngine()).exchange(broadcasts()):
        assert delivery.bytes_up == len(wire.pack_update(delivery.update))
        assert delivery.bytes_down == len(wire.pack_broadcast(broadcasts()["a"]))


@pytest.mark.parametrize(("width", "groups"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (9, [4])])
def test_at_most_width_clients_share_a_batch(width: int, groups: list[int]) -> None:
    engine = ToyEngine()
    assert len(list(transport(engine, width=width).exchange(broadcasts()))) == 4
    assert [len(requests) for requests in engine.sent] == groups


def test_only_the_selected_take_part() -> None:
    mine = transport(ToyEngine())
    selected = {c: m for c, m in broadcasts().items() if c in ("b", "d")}
    assert [d.update.client for d in mine.exchange(selected)] == ["b", "d"]
    assert [c for c, client in mine.clients.items() if client.memory] == ["b", "d"]


def test_a_round_that_fails_leaves_the_memory_as_it_was() -> None:
    class FitsTwice(FedAvg):
        def client(self, message: Broadcast, client: Client) -> Steps[Update]:
            yield from client.fit(message.adapter, round=0, purpose="first")
            return (yield from FedAvg.client(self, message, client))

    class Breaks(ToyEngine):
        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            if len(self.sent) == 3:  # two fits of a and b, one of c and d
                raise MemoryError
            return super().answer(requests)

    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    with pytest.raises(MemoryError):
        list(InProcess(FitsTwice(), Breaks(), clients, width=2).exchange(broadcasts()))
    assert {c: dict(client.memory) for c, client in clients.items()} == {
        "a": {"seen/first": 3, "seen/local": 3},
        "b": {"seen/first": 2, "seen/local": 2},
        "c": {},
        "d": {},
    }


def test_memory_stays_until_the_update_is_taken() -> None:
    mine = transport(ToyEngine())
    deliveries = mine.exchange(broadcasts())
    assert next(deliveries).update.client == "a"
    assert mine.clients["a"].memory == {"seen/local": 3}
    assert mine.clients["b"].memory == {}
