"""The coded way down: everybody ends with the bits the server believes they have, and no error piles up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.errors import RefusedUpdate
from fedloom.experiment.training import Listener
from fedloom.federation import Federation, Round
from fedloom.messages import Broadcast
from fedloom.selection import RoundRobin
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, journal
from fedloom.transport import wire
from fedloom.transport.codec import Bf16, Codec, Fp32, Int4, Int8
from fedloom.transport.downlink import Downlink
from fedloom.transport.in_process import VERSION, InProcess
from tests.fakes import FOUR, ToyEngine, numbers, state, training

LOSSY = [Bf16(), Int8(), Int4(), Int4(zstd=False, levels=7)]
N = 4096


def names(codec: Any) -> str:
    return codec.label.replace(" ", ",") or "fp32"


def noise(round: int) -> AdapterState:
    return AdapterState({"w": torch.randn(N, generator=torch.Generator().manual_seed(round))})


def walk(rounds: int) -> list[AdapterState]:
    """A server's adapter over so many rounds."""
    found = [noise(0)]
    for r in range(1, rounds):
        found.append(found[-1] + 0.1 * noise(r))
    return found


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_whoever_was_away_however_long_has_the_newest_version_to_the_bit(codec: Codec) -> None:
    link, chance = Downlink(codec), random.Random(0)
    have: dict[str, tuple[int, AdapterState]] = {}  # what each client really holds
    for r, adapter in enumerate(walk(25)):
        link.publish(adapter)
        for client in (c for c in "abcdef" if chance.random() < 0.4):
            version, own = have.get(client, (None, None))
            data = link.pack(Broadcast(r, {"adapter": adapter}), version)

            def held(asked: int, own: Any = own, version: Any = version) -> AdapterState:
                assert asked == version
                return own

            message, version = wire.unpack_versioned(data, codec, held)
            have[client] = (version, message.adapter)
            assert message.adapter.sha256() == link.versions[-1].sha256()
            assert (message.round, version) == (r, link.newest)


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_the_newest_version_is_off_by_one_rounding_however_many_rounds(codec: Codec) -> None:
    link = Downlink(codec)
    for adapter in walk(40):
        link.publish(adapter)
    step = 0.1 * noise(0)
    one = (codec.decode(codec.encode(step), step) - step).norm()
    assert (link.versions[-1] - adapter).norm() < 1.5 * one


def test_the_first_version_is_exact() -> None:
    link = Downlink(Int4())
    link.publish(noise(0))
    assert link.versions[-1].sha256() == noise(0).sha256()


def test_steps_are_sent_while_they_are_smaller_than_the_whole() -> None:
    link = Downlink(Int4(zstd=False))
    for adapter in walk(12):
        link.publish(adapter)
    message = Broadcast(11, {"adapter": adapter})
    down = [
        len(link.pack(message, link.newest - gap)) for gap in range(12)
    ]  # to a client last seen so long ago
    assert [size > 4 * N for size in down[:7]] == [False] * 7
    assert (
        down[8:] == [len(link.pack(message, None))] * 4
    )  # 4.25 bits a value: 8 steps are no less than 32 bits
    assert down[0] < 500  # who has it already is told so
    assert down[1] == pytest.approx(4 * N * 4.25 / 32, abs=500)


def test_old_versions_are_forgotten() -> None:
    link = Downlink(Bf16())
    for adapter in walk(10):
        link.publish(adapter)
    assert (link.first, link.newest, len(link.versions)) == (8, 9, 2)


@pytest.mark.parametrize("rounds", [0, 1, 2, 12])
def test_a_server_that_was_restarted_knows_what_it_knew(rounds: int) -> None:
    link = Downlink(Int4())
    for adapter in walk(rounds):
        link.publish(adapter)
    again = Downlink.of(link.into(ServerState(noise(0))), Int4())
    assert (again.first, [v.sha256() for v in again.versions]) == (
        link.first,
        [v.sha256() for v in link.versions],
    )
    message = Broadcast(rounds, {"adapter": noise(0)})
    assert not rounds or again.pack(message, link.first) == link.pack(message, link.first)


def test_slots_of_steps_that_were_forgotten_go() -> None:
    link, kept = Downlink(Bf16()), ServerState(noise(0), slots={"control": noise(1)})
    for adapter in walk(6):
        link.publish(adapter)
        kept = link.into(kept)
    assert sorted(kept.slots) == ["control", "sent+5", "sent@4"]


def test_what_an_algorithm_adds_travels_as_it_is() -> None:
    link = Downlink(Int4())
    for adapter in walk(2):
        link.publish(adapter)
    message = Broadcast(1, {"adapter": adapter, "control": noise(7)}, "evaluate")
    for held in (None, 0):
        arrived = link.unpack(link.pack(message, held))
        assert (arrived.states["control"].sha256(), arrived.task) == (noise(7).sha256(), "evaluate")


def test_damaged_broadcasts_are_refused_or_are_broadcasts() -> None:
    link, chance, refused = Downlink(Int4()), random.Random(0), 0
    for adapter in walk(4):
        link.publish(adapter)

    def held(version: int) -> AdapterState:
        if version != 1:
            raise RefusedUpdate("version", "not held")
        return link.versions[1]

    data = link.pack(Broadcast(3, {"adapter": adapter}), 1)
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(700)] ^= 1 << chance.randrange(8)  # the header, mostly
        cut = bytes(damaged[: chance.randrange(len(data))]) if chance.random() < 0.3 else bytes(damaged)
        try:
            assert isinstance(wire.unpack_versioned(cut, Int4(), held)[0], Broadcast)
        except RefusedUpdate:
            refused += 1
    assert refused > 200


# --- in simulation ---------------------------------------------------------------------------------------------


def test_clients_start_from_what_arrived_and_the_server_adds_to_what_it_has() -> None:
    """One level a block: of a step (0.5, 0.2) only 0.5 arrives; the client's delta is relative to that."""
    client = {"a": Client("a", (0.75,))}
    link = Downlink(Int4(levels=1))
    transport = InProcess(FedAvg(), ToyEngine(), client, downlink=link)
    list(transport.exchange({"a": Broadcast(0, {"adapter": state(0.0, 0.0)})}))
    [second] = transport.exchange({"a": Broadcast(1, {"adapter": state(0.5, 0.2)})})
    assert numbers(link.versions[-1]) == [0.5, 0.0]
    assert numbers(second.update.delta) == [0.0, 0.375]  # halfway from (0.5, 0) to 0.75 is (0.125, 0.375)


def test_a_client_whose_update_did_not_leave_is_not_believed_to_hold_the_version() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = InProcess(FedAvg(), ToyEngine(), clients, width=1, downlink=Downlink(Int4()))
    deliveries = transport.exchange({c: Broadcast(0, {"adapter": state(0.0, 0.0)}) for c in FOUR})
    next(deliveries)  # then the round breaks off
    deliveries.close()  # type: ignore[attr-defined]
    assert [client.memory.get(VERSION) for client in clients.values()] == [0, None, None, None]


def test_adapters_that_differ_from_client_to_client_are_sent_as_they_are() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = InProcess(FedAvg(), ToyEngine(), clients, downlink=Downlink(Int4()))
    own = {c: Broadcast(0, {"adapter": state(0.3, float(i))}) for i, c in enumerate(FOUR)}
    for delivery in transport.exchange(own):
        assert delivery.bytes_down == len(wire.pack_broadcast(own[delivery.update.client]))
    assert transport.downlink.versions == []


def test_under_fp32_every_broadcast_is_what_it_was() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = InProcess(FedAvg(), ToyEngine(), clients, downlink=Downlink(Fp32()))
    message = Broadcast(0, {"adapter": state(0.0, 0.0)})
    assert {d.bytes_down for d in transport.exchange(dict.fromkeys(FOUR, message))} == {
        len(wire.pack_broadcast(message))
    }
    assert all(VERSION not in client.memory for client in clients.values())


class Wide(ToyEngine):
    """An adapter large enough for headers not to matter."""

    def initial_adapter(self) -> AdapterState:
        return state(*[0.0] * N)


def test_a_round_costs_a_step_down_where_everybody_takes_part() -> None:
    seen: list[Round] = []
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = InProcess(FedAvg(), Wide(), clients, downlink=Downlink(Int4()))
    federation = Federation(
        FedAvg(), transport, lambda _: sorted(clients), after_round=lambda _, r: seen.append(r)
    )
    federation.run(FedAvg().init(Wide().initial_adapter()), 3)
    assert [r.bytes_down > 4 * 4 * N for r in seen] == [True, False, False]


class _Stop(Listener):
    def committed(self, record: Mapping[str, Any]) -> None:
        if record["round"] == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_a_resumed_run_sends_the_same_bytes_and_ends_in_the_same_bits(codec: Any, tmp_path: Path) -> None:
    table = {"name": codec.label.split()[0]}

    def run(name: str, listener: Listener) -> ServerState:
        made = training(tmp_path / name, engine=Wide(), rounds=6, transport={"codec": table})
        object.__setattr__(
            made, "select", RoundRobin(sorted(FOUR), count=2)
        )  # two of four: everybody misses steps
        return made.finish(listener)

    whole = run("whole", Listener())
    with pytest.raises(KeyboardInterrupt):
        run("cut", _Stop())
    assert run("cut", Listener()).adapter.sha256() == whole.adapter.sha256()
    sent = {
        name: [(r["bytes_up"], r["bytes_down"]) for r in journal.read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    }
    assert sent["cut"] == sent["whole"]


def test_a_checkpoint_holds_the_oldest_version_and_the_steps_from_it(tmp_path: Path) -> None:
    made = training(tmp_path, transport={"codec": {"name": "bf16"}})
    made.finish(Listener())
    found = checkpoint.newest(tmp_path / "state", fingerprint=made.fingerprint).checkpoint
    assert found is not None
    assert sorted(found.state.slots) == [
        "sent+2",
        "sent@1",
    ]  # versions 0, 1, 2; two steps of bf16 are no gain
