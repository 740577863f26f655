"""The way down, coded: a client receives the steps from the adapter it holds to the newest one.

Every step is coded once, the same for every client: version t = version t-1 + decoded(coded(server's adapter
- version t-1)). So all clients of one version hold the same bits, the server knows them, and each step makes
up for the last one's loss: the newest version is off by one rounding, not by the sum of all. The server's own
adapter is never rounded; deltas are relative to the version a client was sent. A new client, or one whose
version is so old that the steps would be no smaller, receives the newest version whole and uncoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.messages import Broadcast
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.codec import Codec, Parts

OLDEST = "oldest version"  # in a snapshot: the adapter itself
STEP = "step to version "  # in a snapshot: each step from there


@dataclass
class Downlink:
    """The server's side of it. Versions are kept only as far back as their steps are worth sending."""

    codec: Codec
    versions: dict[int, AdapterState] = field(default_factory=dict)  # by number, the oldest first
    steps: list[Parts] = field(default_factory=list)  # each leads from one version to the next

    @property
    def first(self) -> int:
        return next(iter(self.versions), 0)

    @property
    def newest(self) -> int:
        return self.first + len(self.steps)

    def publish(self, adapter: AdapterState) -> None:
        """Make a new version of the server's adapter."""
        if not self.versions:
            self.versions[0] = adapter
            return
        step = self.codec.encode(adapter - self.versions[self.newest])
        self._append(step)
        while sum(map(_weight, self.steps)) >= _weight(adapter):
            del self.steps[0], self.versions[self.first]

    def pack(self, message: Broadcast, held: int | None, *, experiment: str = "") -> bytes:
        """Bytes that bring a client from version `held`, or from none, to the newest version."""
        if held is None or held not in self.versions:
            whole = replace(message, states={**message.states, "adapter": self.versions[self.newest]})
            return wire.pack_broadcast(whole, self.codec, version=self.newest, experiment=experiment)
        steps = self.steps[held - self.first :]
        return wire.pack_broadcast(
            message, self.codec, steps, since=held, version=self.newest, experiment=experiment
        )

    def snapshot(self) -> dict[str, Any]:
        """What a resumed server needs."""
        if not self.versions:
            return {}
        steps = {f"{STEP}{n}": AdapterState(s) for n, s in enumerate(self.steps, start=self.first + 1)}
        return {"first version": self.first, OLDEST: self.versions[self.first], **steps}

    def restore(self, known: Mapping[str, Any]) -> None:
        self.versions.clear()
        self.steps.clear()
        if OLDEST in known:
            self.versions[known["first version"]] = known[OLDEST]
        while (step := known.get(f"{STEP}{self.newest + 1}")) is not None:
            self._append(step)

    def _append(self, step: Parts) -> None:
        newest = self.versions[self.newest]
        self.versions[self.newest + 1] = newest + self.codec.decode(step, newest)
        self.steps.append(step)


def _weight(parts: Parts) -> int:
    return sum(t.numel() * t.element_size() for t in parts.values())
