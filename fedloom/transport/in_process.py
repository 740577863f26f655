"""Simulation: every client in this process, up to `width` of them in one engine batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.steps import Engine, drive
from fedloom.transport import wire
from fedloom.transport.base import Delivery
from fedloom.transport.codec import Fp32
from fedloom.transport.downlink import Downlink
from fedloom.transport.error_feedback import still_owed, with_what_is_owed

VERSION = "held version"  # in a client's memory: of the adapter it was sent last


@dataclass(frozen=True)
class InProcess:
    """A client's memory of this round is kept aside and taken over only when its update has left.

    The codec of `downlink` is that of both directions.
    """

    algorithm: Algorithm
    engine: Engine
    clients: Mapping[ClientId, Client]
    width: int = 8
    downlink: Downlink = field(default_factory=lambda: Downlink(Fp32()))

    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Delivery]:
        versioned = self._publish(broadcasts)
        queue = iter(broadcasts.items())
        while group := list(islice(queue, self.width)):
            staged = {c: self.clients[c].staged() for c, _ in group}
            down = {c: self._down(message, staged[c], versioned=versioned) for c, message in group}
            work = {c: self.algorithm.client(message, staged[c]) for c, (message, _) in down.items()}
            for update in drive(work, self.engine):
                client, (message, bytes_down) = staged[update.client], down[update.client]
                arrived, bytes_up = self._up(update, message, client)
                self.clients[update.client].memory = client.memory
                yield Delivery(arrived, bytes_up, bytes_down)

    def _publish(self, broadcasts: Mapping[ClientId, Broadcast]) -> bool:
        """There are versions only of an adapter that is the same for everybody."""
        adapters = list({id(message.adapter): message.adapter for message in broadcasts.values()}.values())
        if not self.downlink.codec.label or not adapters:
            return False
        if len(adapters) > 1 and len({adapter.sha256() for adapter in adapters}) > 1:
            return False
        self.downlink.publish(adapters[0])
        return True

    def _down(self, message: Broadcast, client: Client, *, versioned: bool) -> tuple[Broadcast, int]:
        held = client.memory.pop(VERSION, None)
        if not versioned:
            data = wire.pack_broadcast(message)
            return wire.unpack_broadcast(data), len(data)
        data = self.downlink.pack(message, held)
        client.memory[VERSION] = self.downlink.newest
        return self.downlink.unpack(data), len(data)

    def _up(self, update: Update, message: Broadcast, client: Client) -> tuple[Update, int]:
        codec = self.downlink.codec
        meant = with_what_is_owed(update, client.memory) if codec.error_feedback else update
        data = wire.pack_update(meant, codec)
        arrived = wire.unpack_update(data, codec, message.adapter)
        if codec.error_feedback:
            client.memory.update(still_owed(meant, arrived))
        return arrived, len(data)
