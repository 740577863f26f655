"""The coded way down: everybody ends with the bits the server believes they have, and no error piles up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.experiment.listener import Listener
from fedloom.federation import Federation, Round
from fedloom.messages import Broadcast
from fedloom.selection import RoundRobin
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, journal
from fedloom.transport import wire
from fedloom.transport.codec import Bf16, Codec, Fp32, Int4, Int8
from fedloom.transport.downlink import Downlink
from fedloom.transport.in_process import Simulation
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
    have: dict[str, dict[int, AdapterState]] = {}  # what each client really holds, by version
    for r, adapter in enumerate(walk(25)):
        link.publish(adapter)
        for client in (c for c in "abcdef" if chance.random() < 0.4):
            own = have.get(client, {})
            data = link.pack(Broadcast(r, {"adapter": adapter}), next(iter(own), None))
            message = wire.unpack_broadcast(data, codec, own)
            have[client] = {link.newest: own[link.newest]}
            assert message.adapter.sha256() == link.versions[link.newest].sha256()
            assert message.round == r


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_the_newest_version_is_off_by_one_rounding_however_many_rounds(codec: Codec) -> None:
    link = Downlink(codec)
    for adapter in walk(40):
        link.publish(adapter)
    step = 0.1 * noise(0)
    one = (codec.decode(codec.encode(step), step) - step).norm()
    assert (link.versions[link.newest] - adapter).norm() < 1.5 * one


def test_the_first_version_is_exact() -> None:
    link = Downlink(Int4())
    link.publish(noise(0))
    assert link.versions[link.newest].sha256() == noise(0).sha256()


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
    again = Downlink(Int4())
    again.restore(link.snapshot())
    assert {n: v.sha256() for n, v in again.versions.items()} == {
        n: v.sha256() for n, v in link.versions.items()
    }
    message = Broadcast(rounds, {"adapter": noise(0)})
    assert not rounds or again.pack(message, link.first) == link.pack(message, link.first)


def test_a_snapshot_holds_no_more_than_the_oldest_version_and_the_steps_from_it() -> None:
    link = Downlink(Bf16())
    for adapter in walk(6):
        link.publish(adapter)
    assert sorted(link.snapshot()) == ["first version", "oldest version", "step to version 5"]


def test_what_an_algorithm_adds_travels_as_it_is() -> None:
    link = Downlink(Int4())
    for adapter in walk(2):
        link.publish(adapter)
    message = Broadcast(1, {"adapter": adapter, "control": noise(7)}, 0)
    for held in (None, 0):
        arrived = wire.unpack_broadcast(link.pack(message, held), Int4(), dict(link.versions))
        assert (arrived.states["control"].sha256(), arrived.acknowledged) == (noise(7).sha256(), 0)


# --- in simulation ---------------------------------------------------------------------------------------------


def test_clients_start_from_what_arrived_and_the_server_adds_to_what_it_has() -> None:
    """One level a block: of a step (0.5, 0.2) only 0.5 arrives; the client's delta is relative to that."""
    client = {"a": Client("a", (0.75,))}
    transport = Simulation(FedAvg(), ToyEngine(), client, codec=Int4(levels=1))
    link = transport.server.downlink
    list(transport.exchange({"a": Broadcast(0, {"adapter": state(0.0, 0.0)})}))
    transport.settle(0, ["a"])
    [second] = transport.exchange({"a": Broadcast(1, {"adapter": state(0.5, 0.2)})})
    assert numbers(link.versions[link.newest]) == [0.5, 0.0]
    assert numbers(second.open().delta) == [0.0, 0.375]  # halfway from (0.5, 0) to 0.75 is (0.125, 0.375)


def test_a_client_whose_update_was_not_used_is_not_believed_to_hold_the_version() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = Simulation(FedAvg(), ToyEngine(), clients, codec=Int4())
    list(transport.exchange({c: Broadcast(0, {"adapter": state(0.0, 0.0)}) for c in FOUR}))
    assert transport.server.holds == {}
    transport.settle(0, ["a"])
    assert transport.server.holds == {"a": 0}


def test_adapters_that_differ_from_client_to_client_are_sent_as_they_are() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = Simulation(FedAvg(), ToyEngine(), clients, codec=Int4())
    own = {c: Broadcast(0, {"adapter": state(0.3, float(i))}) for i, c in enumerate(FOUR)}
    for arrived in transport.exchange(own):
        assert arrived.bytes_down == len(wire.pack_broadcast(own[arrived.client], Int4()))
    assert transport.server.downlink.versions == {}


def test_under_fp32_every_broadcast_is_what_it_was() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = Simulation(FedAvg(), ToyEngine(), clients, codec=Fp32())
    message = Broadcast(0, {"adapter": state(0.0, 0.0)})
    assert {d.bytes_down for d in transport.exchange(dict.fromkeys(FOUR, message))} == {
        len(wire.pack_broadcast(message))
    }
    assert transport.server.downlink.versions == {}


class Wide(ToyEngine):
    """An adapter large enough for headers not to matter."""

    def initial_adapter(self, seed: int = 0) -> AdapterState:
        return state(*[0.0] * N)


def test_a_round_costs_a_step_down_where_everybody_takes_part() -> None:
    seen: list[Round] = []
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = Simulation(FedAvg(), Wide(), clients, codec=Int4())
    federation = Federation(
        FedAvg(), transport, lambda _: sorted(clients), after_round=lambda _, r: seen.append(r)
    )
    federation.run(FedAvg().init(Wide().initial_adapter(0)), 3)
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
            made, "select", partial(RoundRobin(count=2), sorted(FOUR), 0)
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
    found = checkpoint.newest(tmp_path / "state", fingerprint=made.training.fingerprint).checkpoint
    assert found is not None
    assert found.state.slots == {}
    assert sorted(found.transport.server) == [
        "acknowledged",
        "first version",
        "holds",
        "oldest version",
        "step to version 2",
    ]  # versions 0, 1, 2; two steps of bf16 are no gain
    assert found.transport.server["holds"] == dict.fromkeys("abcd", 2)
