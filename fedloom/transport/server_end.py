"""The server's end: messages over any channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.base import Arrival, Snapshot
from fedloom.transport.channel import TRAIN, Channel
from fedloom.transport.codec import Fp32
from fedloom.transport.downlink import Downlink


@dataclass
class ServerEnd:
    """A Transport. The codec of `downlink` serves both directions."""

    channel: Channel
    expects: Callable[[Broadcast], Mapping[str, AdapterState]]  # Algorithm.expects
    downlink: Downlink = field(default_factory=lambda: Downlink(Fp32()))
    experiment: str = ""  # identifies settings and base model, in every message
    acknowledged: dict[ClientId, int] = field(default_factory=dict)  # last round that used its update
    holds: dict[ClientId, int] = field(default_factory=dict)  # version it was sent in that round

    def exchange(self, broadcasts: Mapping[ClientId, Broadcast]) -> Iterator[Arrival]:
        letters = _Letters(broadcasts, partial(self._pack, versioned=self._publish(broadcasts)))
        for client, data in self.channel.call(TRAIN, letters):
            sent = letters.sizes.get(client, 0)
            yield Arrival(client, len(data), sent, partial(self._open, data, broadcasts.get(client)))

    def settle(self, round: int, used: Collection[ClientId]) -> None:
        for client in used:
            self.acknowledged[client] = round
            if self.downlink.versions:
                self.holds[client] = self.downlink.newest

    def snapshot(self) -> Snapshot:
        known = {"acknowledged": dict(self.acknowledged), "holds": dict(self.holds)}
        return Snapshot(server={**known, **self.downlink.snapshot()})

    def restore(self, snapshot: Snapshot) -> None:
        self.acknowledged = dict(snapshot.server.get("acknowledged", {}))
        self.holds = dict(snapshot.server.get("holds", {}))
        self.downlink.restore(snapshot.server)

    def _publish(self, broadcasts: Mapping[ClientId, Broadcast]) -> bool:
        """Make a new version if every client gets the same adapter; return whether one was made."""
        adapters = list({id(message.adapter): message.adapter for message in broadcasts.values()}.values())
        if not self.downlink.codec.label or not adapters:
            return False
        if len(adapters) > 1 and len({adapter.sha256() for adapter in adapters}) > 1:
            return False
        self.downlink.publish(adapters[0])
        return True

    def _pack(self, client: ClientId, message: Broadcast, *, versioned: bool) -> bytes:
        message = replace(message, acknowledged=self.acknowledged.get(client))
        if not versioned:
            return wire.pack_broadcast(message, self.downlink.codec, experiment=self.experiment)
        return self.downlink.pack(message, self.holds.get(client), experiment=self.experiment)

    def _open(self, data: bytes, sent: Broadcast | None) -> Update:
        expected = {} if sent is None else self.expects(sent)
        return wire.unpack_update(data, self.downlink.codec, expected, experiment=self.experiment)


class _Letters(Mapping[ClientId, bytes]):
    """Broadcasts as bytes, each packed on access; `sizes` holds the sizes of those packed so far."""

    def __init__(
        self, broadcasts: Mapping[ClientId, Broadcast], pack: Callable[[ClientId, Broadcast], bytes]
    ):
        self._broadcasts, self._pack = broadcasts, pack
        self.sizes: dict[ClientId, int] = {}

    def __getitem__(self, client: ClientId) -> bytes:
        data = self._pack(client, self._broadcasts[client])
        self.sizes[client] = len(data)
        return data

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._broadcasts)

    def __len__(self) -> int:
        return len(self._broadcasts)
