"""The client's end: a client is a generator from bytes to bytes.

In simulation `drive` advances many of them together; on a network one runs alone. The code is the same.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.errors import RefusedUpdate
from fedloom.messages import Update
from fedloom.state import AdapterState
from fedloom.steps import Steps
from fedloom.transport import wire
from fedloom.transport.channel import TRAIN
from fedloom.transport.codec import Codec, Fp32
from fedloom.transport.error_feedback import Residual, add_residual, residual

Outgoing = Callable[[Update, Client], Update]  # clips, adds noise, asks a policy, writes a ledger


@dataclass(frozen=True)
class _Staged:
    """What a client will remember of a round once that is acknowledged."""

    round: int
    memory: dict[str, Any]
    residual: Residual


@dataclass
class ClientEnd:
    """One client, and what it keeps between rounds.

    A round leaves no trace in the client's memory or in the residual until the server has acknowledged it:
    a refused or lost update leaves the client as it was.
    """

    client: Client
    algorithm: Algorithm
    codec: Codec = Fp32()
    experiment: str = ""  # identifies settings and base model; a broadcast of another is refused
    # Adapters by version, from which coded steps continue. Clients of one process share it: a version has the
    # same bits for all.
    held: MutableMapping[int, AdapterState] = field(default_factory=dict)
    outgoing: Sequence[Outgoing] = ()
    residual: Residual = field(default_factory=dict)
    staged: _Staged | None = None

    def reply(self, method: str, data: bytes) -> Steps[bytes]:
        """The update, packed. Raises: RefusedUpdate, if the bytes are not a broadcast of this experiment."""
        if method != TRAIN:
            raise RefusedUpdate("method", f"expected the method {TRAIN!r}, got {method!r}")
        message = wire.unpack_broadcast(data, self.codec, self.held, experiment=self.experiment)
        self.settle(message.acknowledged)
        client = self.client.staged()
        update = yield from self.algorithm.client(message, client)
        for change in self.outgoing:
            update = change(update, client)
        update = replace(update, round=message.round)
        owed = self.residual
        if self.codec.error_feedback:
            update = add_residual(update, owed)
        packed = wire.pack_update(update, self.codec, experiment=self.experiment)
        if self.codec.error_feedback:
            expected = self.algorithm.expects(message)
            arrives = wire.unpack_update(packed, self.codec, expected, experiment=self.experiment)
            owed = {**owed, **residual(update, arrives)}
        self.staged = _Staged(message.round, client.memory, owed)
        return packed

    def settle(self, acknowledged: int | None) -> None:
        """Remember the staged round if it was acknowledged; else forget it."""
        if self.staged is not None and self.staged.round == acknowledged:
            self.client.memory, self.residual = self.staged.memory, self.staged.residual
        self.staged = None
