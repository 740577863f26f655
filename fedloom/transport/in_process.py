"""Simulation: every client in this process, up to `width` of them in one engine batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId
from fedloom.steps import Engine, drive
from fedloom.transport import wire
from fedloom.transport.base import Delivery
from fedloom.transport.codec import Codec, Fp32
from fedloom.transport.error_feedback import still_owed, with_what_is_owed


@dataclass(frozen=True)
class InProcess:
    """A client's memory of this round is kept aside and taken over only when its update has left."""

    algorithm: Algorithm
    engine: Engine
    clients: Mapping[ClientId, Client]
    width: int = 8
    codec: Codec = Fp32()

    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Delivery]:
        queue = iter(broadcasts.items())
        while group := list(islice(queue, self.width)):
            down = {c: wire.pack_broadcast(message) for c, message in group}
            staged = {c: self.clients[c].staged() for c, _ in group}
            work = {c: self.algorithm.client(wire.unpack_broadcast(down[c]), staged[c]) for c, _ in group}
            for update in drive(work, self.engine):
                memory = staged[update.client].memory
                meant = with_what_is_owed(update, memory) if self.codec.error_feedback else update
                up = wire.pack_update(meant, self.codec)
                arrived = wire.unpack_update(up, self.codec, broadcasts[update.client].adapter)
                if self.codec.error_feedback:
                    memory.update(still_owed(meant, arrived))
                self.clients[update.client].memory = memory
                yield Delivery(arrived, len(up), len(down[update.client]))
