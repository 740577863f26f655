"""Simulation: every client in this process, up to `clients_per_batch` of them in one engine batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId
from fedloom.steps import Engine, drive_groups
from fedloom.transport.base import Arrival, Snapshot
from fedloom.transport.client_end import ClientEnd
from fedloom.transport.codec import Codec, Fp32
from fedloom.transport.downlink import Downlink
from fedloom.transport.server_end import ServerEnd


@dataclass(frozen=True)
class InProcess:
    """A Channel to clients' ends. Groups are formed, and answered, in the order of the payloads."""

    ends: Mapping[ClientId, ClientEnd]
    engine: Engine
    clients_per_batch: int = 8

    def call(self, method: str, payloads: Mapping[ClientId, bytes]) -> Iterator[tuple[ClientId, bytes]]:
        letters = iter(payloads.items())
        groups = iter(lambda: list(islice(letters, self.clients_per_batch)), [])
        work = ({c: self.ends[c].reply(method, data) for c, data in group} for group in groups)
        return drive_groups(work, self.engine)


class Simulation:
    """A Transport with both ends in this process, over real bytes.

    Unlike a real server it can read clients' memories: they are part of its snapshot, so that a killed run
    can resume. Clients settle at the end of a round; on a network the next broadcast tells them to.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        engine: Engine,
        clients: Mapping[ClientId, Client],
        *,
        clients_per_batch: int = 8,
        codec: Codec = Fp32(),
        experiment: str = "",
    ):
        downlink = Downlink(codec)
        self.ends = {
            c: ClientEnd(client, algorithm, codec, experiment, downlink.versions)
            for c, client in clients.items()
        }
        channel = InProcess(self.ends, engine, clients_per_batch)
        self.server = ServerEnd(channel, algorithm.expects, downlink, experiment)

    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Arrival]:
        return self.server.exchange(broadcasts)

    def settle(self, round: int, used: Collection[ClientId]) -> None:
        self.server.settle(round, used)
        for client, end in self.ends.items():
            end.settle(self.server.acknowledged.get(client))

    def snapshot(self) -> Snapshot:
        return replace(
            self.server.snapshot(),
            memories={c: end.client.memory for c, end in self.ends.items() if end.client.memory},
            residuals={c: end.residual for c, end in self.ends.items() if end.residual},
        )

    def restore(self, snapshot: Snapshot) -> None:
        self.server.restore(snapshot)
        for client, end in self.ends.items():
            end.client.memory = dict(snapshot.memories.get(client, {}))
            end.residual = dict(snapshot.residuals.get(client, {}))
            end.staged = None
