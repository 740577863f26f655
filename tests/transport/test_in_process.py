"""Simulation sends real bytes, and keeps a client's memory only once its update was used."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.errors import RefusedUpdate
from fedloom.federation import Federation
from fedloom.messages import Broadcast, Update
from fedloom.selection import RoundRobin
from fedloom.steps import Steps
from fedloom.transport import wire
from fedloom.transport.client_end import ClientEnd
from fedloom.transport.codec import Fp32, Int4, Int8
from fedloom.transport.downlink import Downlink
from fedloom.transport.in_process import InProcess, Simulation
from fedloom.transport.server_end import ServerEnd
from tests.fakes import FOUR, ToyEngine, numbers, run_alone, state


def transport(engine: Any, *, width: int = 8) -> Simulation:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    return Simulation(FedAvg(), engine, clients, clients_per_batch=width)


def memories(mine: Simulation) -> dict[str, dict[str, Any]]:
    return {c: end.client.memory for c, end in mine.ends.items()}


def broadcasts() -> dict[str, Broadcast]:
    return {c: Broadcast(0, {"adapter": state(0.0, 0.0)}) for c in FOUR}


def test_bytes_are_those_of_the_packed_messages() -> None:
    for arrived in transport(ToyEngine()).exchange(broadcasts()):
        assert arrived.bytes_up == len(wire.pack_update(arrived.open()))
        assert arrived.bytes_down == len(wire.pack_broadcast(broadcasts()["a"]))


@pytest.mark.parametrize(("width", "groups"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (9, [4])])
def test_at_most_width_clients_share_a_batch(width: int, groups: list[int]) -> None:
    engine = ToyEngine()
    assert len(list(transport(engine, width=width).exchange(broadcasts()))) == 4
    assert [len(requests) for requests in engine.sent] == groups


def test_only_the_selected_take_part() -> None:
    mine = transport(ToyEngine())
    selected = {c: m for c, m in broadcasts().items() if c in ("b", "d")}
    assert [arrived.client for arrived in mine.exchange(selected)] == ["b", "d"]


def test_a_round_leaves_no_trace_before_it_is_settled() -> None:
    mine = transport(ToyEngine())
    assert len(list(mine.exchange(broadcasts()))) == 4
    assert memories(mine) == {c: {} for c in FOUR}


def test_whose_update_was_used_remembers_the_round_and_nobody_else() -> None:
    mine = transport(ToyEngine())
    list(mine.exchange(broadcasts()))
    mine.settle(0, ["b", "d"])
    assert memories(mine) == {"a": {}, "b": {"seen/local": 2}, "c": {}, "d": {"seen/local": 4}}
    mine.settle(0, ["a"])  # what was forgotten does not come back
    assert memories(mine)["a"] == {}


def test_a_client_that_was_not_used_does_the_same_work_again() -> None:
    mine = transport(ToyEngine())
    first = {a.client: a.open().delta.sha256() for a in mine.exchange(broadcasts())}
    mine.settle(0, [])
    again = {a.client: a.open().delta.sha256() for a in mine.exchange(broadcasts())}
    assert again == first


def test_a_round_that_breaks_off_leaves_the_memory_as_it_was() -> None:
    class Breaks(ToyEngine):
        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            if len(self.sent) == 1:  # a and b have answered, c and d have not
                raise MemoryError
            return super().answer(requests)

    mine = transport(Breaks(), width=2)
    with pytest.raises(MemoryError):
        list(mine.exchange(broadcasts()))
    assert memories(mine) == {c: {} for c in FOUR}


def test_an_error_in_a_client_half_names_the_client() -> None:
    class Breaks(FedAvg):
        def client(self, message: Broadcast, client: Client) -> Steps[Update]:
            if client.id == "c":
                raise LookupError("an empty table")
            return (yield from FedAvg.client(self, message, client))

    mine = Simulation(Breaks(), ToyEngine(), {c: Client(c, xs) for c, xs in FOUR.items()})
    with pytest.raises(LookupError) as raised:
        list(mine.exchange(broadcasts()))
    assert raised.value.__notes__ == ["while c was at work"]


def test_a_letter_is_packed_when_its_group_is_taken() -> None:
    mine, packed = transport(ToyEngine(), width=1), list[str]()
    pack = mine.server._pack

    def counted(client: str, message: Broadcast, *, versioned: bool) -> bytes:
        packed.append(client)
        return pack(client, message, versioned=versioned)

    mine.server._pack = counted  # type: ignore[method-assign]
    next(mine.exchange(broadcasts()))
    assert packed == ["a"]


def test_a_restored_transport_sends_the_very_same_bytes() -> None:
    def letters(mine: Simulation) -> list[bytes]:
        message = Broadcast(3, {"adapter": state(9.0, 0.0)})
        versioned = bool(mine.server.downlink.versions)
        return [mine.server._pack(c, message, versioned=versioned) for c in FOUR]

    for codec in (Fp32(), Int4(error_feedback=True)):
        clients = [{c: Client(c, xs) for c, xs in FOUR.items()} for _ in range(2)]
        first, second = (Simulation(FedAvg(), ToyEngine(), own, codec=codec) for own in clients)
        for r in range(3):
            list(first.exchange({c: Broadcast(r, {"adapter": state(float(r), 0.0)}) for c in FOUR}))
            first.settle(r, ["a", "c"])
        second.restore(first.snapshot())
        assert letters(second) == letters(first)
        assert memories(second) == memories(first)


# --- a client's end alone, as on a network ---------------------------------------------------------------------


def end(**options: Any) -> ClientEnd:
    return ClientEnd(Client("a", (1.0, 2.0)), FedAvg(), **options)


def letter(round: int, acknowledged: int | None = None, **options: Any) -> bytes:
    return wire.pack_broadcast(Broadcast(round, {"adapter": state(0.0, 0.0)}, acknowledged), **options)


def test_a_client_remembers_a_round_when_a_later_broadcast_acknowledges_it() -> None:
    mine = end()
    run_alone(mine.reply("train", letter(0)), ToyEngine())
    assert mine.client.memory == {}
    run_alone(mine.reply("train", letter(1, acknowledged=0)), ToyEngine())
    assert mine.client.memory == {"seen/local": 2}


def test_a_round_that_was_lost_is_forgotten_and_the_next_starts_from_before_it() -> None:
    mine, other = end(), end()
    run_alone(mine.reply("train", letter(0)), ToyEngine())
    after_loss = run_alone(mine.reply("train", letter(1)), ToyEngine())
    assert mine.client.memory == {}
    assert after_loss == run_alone(other.reply("train", letter(1)), ToyEngine())


def test_an_update_says_which_round_it_answers() -> None:
    data = run_alone(end().reply("train", letter(7)), ToyEngine())
    assert wire.unpack_update(data).round == 7


def test_a_broadcast_of_another_experiment_is_refused_before_any_work() -> None:
    with pytest.raises(RefusedUpdate) as refused:
        run_alone(end(experiment="ours").reply("train", letter(0, experiment="theirs")), ToyEngine())
    assert refused.value.code == "experiment"


def test_what_changes_an_outgoing_update_comes_before_it_is_packed() -> None:
    def halved(update: Update, client: Client) -> Update:
        return replace(update, states={name: 0.5 * s for name, s in update.states.items()})

    plain = wire.unpack_update(run_alone(end().reply("train", letter(0)), ToyEngine()))
    half = wire.unpack_update(run_alone(end(outgoing=[halved]).reply("train", letter(0)), ToyEngine()))
    assert numbers(half.delta) == [x / 2 for x in numbers(plain.delta)]


@pytest.mark.parametrize("codec", [Fp32(), Int4(), Int8(error_feedback=True)], ids=lambda c: c.label)
def test_ends_that_share_nothing_come_to_the_bits_of_a_simulation(codec: Any) -> None:
    """Each client with its own versions, as in a process of its own."""

    def run(apart: bool) -> str:
        clients = {c: Client(c, xs) for c, xs in FOUR.items()}
        transport: Any = Simulation(FedAvg(), ToyEngine(), clients, codec=codec)
        if apart:
            ends = {c: ClientEnd(client, FedAvg(), codec) for c, client in clients.items()}
            transport = ServerEnd(InProcess(ends, ToyEngine()), FedAvg().expects, Downlink(codec))
        select = partial(RoundRobin(2), sorted(FOUR), 0)
        return Federation(FedAvg(), transport, select).run(ServerState(state(0.5, 0.25)), 7).adapter.sha256()

    assert run(apart=True) == run(apart=False)
