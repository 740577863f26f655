"""Channel: carries bytes. It knows who is at the other end, but not what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from fedloom.messages import ClientId

TRAIN = "train"  # the only method: a broadcast, answered by an update


class Channel(Protocol):
    def call(self, method: str, payloads: Mapping[ClientId, bytes]) -> Iterator[tuple[ClientId, bytes]]:
        """Call `method` at each client; yield (client, answer) on arrival; a lost client yields nothing.

        The client is whom the channel has authenticated. `payloads` packs a client's bytes on access, the
        same bytes every time: a channel that takes them one by one never holds all of them.
        """
        ...
