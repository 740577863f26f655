"""Channel: what carries bytes. It knows who is at the other end, and nothing of what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from fedloom.messages import ClientId

TRAIN = "train"  # the one method so far: a broadcast is answered by an update


class Channel(Protocol):
    def call(self, method: str, payloads: Mapping[ClientId, bytes]) -> Iterator[tuple[ClientId, bytes]]:
        """Have `method` done by each client, yield (client, answer) as answers come; a lost client yields nothing.

        The client is whom the channel has authenticated. `payloads` makes a letter when it is asked for it, the
        same each time: whoever takes them one by one never holds all of them.
        """
        ...
