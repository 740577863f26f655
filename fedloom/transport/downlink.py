"""The way down, coded: a client gets the steps from the adapter it has to the newest one.

Every step is coded once and is the same for everybody: version t = version t-1 + decoded(coded(server's
adapter - version t-1)). So all clients of one version hold the same bits, the server knows them, and what a step
loses is part of the next: the newest version is off by one rounding, not by the sum of all. The server's own
adapter is never rounded; deltas are relative to the version a client was sent. A client that is new, or whose
version is so old that the steps to it are no smaller, gets the newest version as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedloom.algorithms.base import ServerState
from fedloom.messages import Broadcast
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.codec import Codec, Parts

SLOT = "sent"  # in the server's state: "sent@7" is version 7, "sent+8" the step from it to version 8


@dataclass
class Downlink:
    """The server's end. `versions` are kept only as far back as steps are worth sending."""

    codec: Codec
    first: int = 0  # the number of versions[0]
    versions: list[AdapterState] = field(default_factory=list)
    steps: list[Parts] = field(default_factory=list)  # steps[i] leads from versions[i] to versions[i + 1]

    @property
    def newest(self) -> int:
        return self.first + len(self.steps)

    def publish(self, adapter: AdapterState) -> None:
        """Make a new version of the server's adapter."""
        if not self.versions:
            self.versions.append(adapter)
            return
        step = self.codec.encode(adapter - self.versions[-1])
        self.versions.append(_after(self.versions[-1], step, self.codec))
        self.steps.append(step)
        while sum(map(_weight, self.steps)) >= _weight(adapter):
            del self.steps[0], self.versions[0]
            self.first += 1

    def pack(self, message: Broadcast, held: int | None) -> bytes:
        """For a client that holds this version, or none; the adapter it gets is the newest version."""
        if held is None or held < self.first:
            whole = replace(message, states={**message.states, "adapter": self.versions[-1]})
            return wire.pack_versioned(whole, (), self.codec, since=None, version=self.newest)
        return wire.pack_versioned(
            message, self.steps[held - self.first :], self.codec, since=held, version=self.newest
        )

    def unpack(self, data: bytes) -> Broadcast:
        """What a client that holds the version the message starts from makes of it."""
        message, _ = wire.unpack_versioned(
            data, self.codec, lambda version: self.versions[version - self.first]
        )
        return message

    def into(self, state: ServerState) -> ServerState:
        """With what a resumed server has to know."""
        if not self.versions:
            return state
        slots = {
            name: slot for name, slot in state.slots.items() if not name.startswith((SLOT + "@", SLOT + "+"))
        }
        slots[f"{SLOT}@{self.first}"] = self.versions[0]
        slots |= {
            f"{SLOT}+{n}": AdapterState(step) for n, step in enumerate(self.steps, start=self.first + 1)
        }
        return replace(state, slots=slots)

    @staticmethod
    def of(state: ServerState, codec: Codec) -> Downlink:
        """As it was when `into` put it there."""
        made = Downlink(codec)
        for name, slot in state.slots.items():
            if name.startswith(SLOT + "@"):
                made.first, made.versions = int(name.removeprefix(SLOT + "@")), [slot]
        while (step := state.slots.get(f"{SLOT}+{made.newest + 1}")) is not None:
            made.versions.append(_after(made.versions[-1], step, codec))
            made.steps.append(step)
        return made


def _after(adapter: AdapterState, step: Parts, codec: Codec) -> AdapterState:
    return adapter + codec.decode(step, adapter)


def _weight(parts: Parts) -> int:
    return sum(t.numel() * t.element_size() for t in parts.values())
