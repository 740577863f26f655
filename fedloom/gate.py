"""The gate: one check in front of every update, wherever it comes from.

A refused client is left out of the round and counted under a reason code. The round goes on and gives the
same bits as a round without that client. The gate stops what no honest client would send. A poisoned update
that looks honest passes.

    unknown    from a client that was not asked     states      other states than the algorithm expects
    duplicate  a second answer in one round         keys        missing or extra tensors
    size       more bytes than an answer needs      shape, dtype   of a tensor
    malformed, schema, codec, experiment            non-finite  NaN or infinity
               bytes the transport cannot read      subnormal   most values too small for normal arithmetic
    sender     speaks for another client            norm        beyond the bound, or out of proportion
    round      answers another round                metrics     unknown names, or values that are not numbers
    weight     outside 0 to max_weight
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fedloom.errors import ConfigError, RefusedUpdate
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.transport.base import Arrival

LARGEST = 2.0**53  # largest metric: counts up to here are exact, and sums of them stay finite


@dataclass(frozen=True)
class Admitted:
    update: Update
    norms: Mapping[str, float]  # L2 norm of each state


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Defaults are far above anything measured from honest clients; docs/round.md has the figures."""

    max_norm: float = 1000.0  # L2 norm of a state
    max_norm_ratio: float = 50.0  # of that norm to the median of the cohort's
    max_weight: float = 1e6  # examples; a client that claims 10^9 would be the mean by itself
    max_bytes: int | None = None  # of an answer; None: the size of the expected tensors uncoded, plus a tenth

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"Expected gate.{name} above 0 and finite, got {getattr(self, name)}.")
        if not 1 < self.max_norm_ratio < math.inf:
            raise ConfigError(f"Expected gate.max_norm_ratio above 1, got {self.max_norm_ratio}.")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"Expected gate.max_bytes of at least 1, got {self.max_bytes}.")

    def admit(
        self,
        arrival: Arrival,
        sent: Mapping[ClientId, Broadcast],
        expected: Mapping[str, AdapterState],
        reports: Collection[str],
        answered: Collection[ClientId],
    ) -> Admitted:
        """The update, if it can be an answer to what this client was sent.

        `expected` (states, tensor by tensor) and `reports` (names of metrics) come from the algorithm. Sender
        and size are judged before the message is opened. Reasons name tensors and numbers, never text.
        Raises: RefusedUpdate.
        """
        client = arrival.client
        if client not in sent:
            raise RefusedUpdate("unknown", f"{client} was not asked in this round")
        if client in answered:
            raise RefusedUpdate("duplicate", f"{client} has already answered in this round")
        if arrival.bytes_up > (most := self._room(expected)):
            raise RefusedUpdate("size", f"expected at most {most:,} bytes, got {arrival.bytes_up:,}")
        update = arrival.open()
        if update.client != client:
            raise RefusedUpdate("sender", f"{client} speaks for another client")
        if update.round != sent[client].round:
            raise RefusedUpdate(
                "round", f"expected an answer to round {sent[client].round}, got {update.round}"
            )
        if not 0 <= update.weight <= self.max_weight:
            raise RefusedUpdate("weight", f"expected a weight from 0 to {self.max_weight:g}, got another")
        if update.states.keys() != expected.keys():
            raise RefusedUpdate("states", f"expected {sorted(expected)}, got {len(update.states)} states")
        norms = {name: self._norm(name, state, expected[name]) for name, state in update.states.items()}
        if not update.metrics.keys() <= set(reports):
            raise RefusedUpdate("metrics", f"expected metrics of {sorted(reports)}, got others")
        if odd := sorted(name for name, value in update.metrics.items() if not abs(value) < math.inf):
            raise RefusedUpdate("non-finite", f"{odd[0]} is NaN or infinity")
        if odd := sorted(name for name, value in update.metrics.items() if abs(value) > LARGEST):
            raise RefusedUpdate("metrics", f"{odd[0]} is not a number up to {LARGEST:.0e}")
        return Admitted(update, norms)

    def proportionate(self, admitted: Admitted, cohort: Mapping[str, Sequence[float]]) -> None:
        """Compare an update's norms with those of the round so far, its own included. Raises: RefusedUpdate.

        `cohort` holds the norms above zero of updates with a positive weight.
        """
        if not admitted.update.weight > 0:
            return
        for name, norm in admitted.norms.items():
            most = self.max_norm_ratio * median(cohort[name]) if cohort.get(name) else math.inf
            if norm > most:
                raise RefusedUpdate(
                    "norm", f"{name}: norm {norm:.3g} is more than {self.max_norm_ratio:g} times the median"
                )

    def _room(self, expected: Mapping[str, AdapterState]) -> int:
        """Bytes for the tensors' values, names and offsets, plus 64 KiB for the rest."""
        if self.max_bytes is not None:
            return self.max_bytes
        tensors = [(name, t) for state in expected.values() for name, t in state.items()]
        values = sum(t.numel() * t.element_size() for _, t in tensors)
        return values + values // 10 + sum(512 + 4 * len(name) for name, _ in tensors) + 65_536

    def _norm(self, state: str, vector: AdapterState, expected: AdapterState) -> float:
        if vector.keys() != expected.keys():
            count = len(vector.keys() ^ expected.keys())
            raise RefusedUpdate("keys", f"{state}: {count} tensors are missing or unexpected")
        for name, tensor in vector.items():
            like = expected[name]
            if tensor.shape != like.shape:
                raise RefusedUpdate(
                    "shape", f"{state}/{name}: expected {tuple(like.shape)}, got {tuple(tensor.shape)}"
                )
            if tensor.dtype != like.dtype:
                raise RefusedUpdate("dtype", f"{state}/{name}: expected {like.dtype}, got {tensor.dtype}")
        if not vector.is_finite():
            raise RefusedUpdate("non-finite", f"{state} holds NaN or infinity")
        if 2 * vector.subnormal() > vector.numel():
            raise RefusedUpdate("subnormal", f"most values of {state} are subnormal numbers")
        norm = vector.norm()
        if not norm <= self.max_norm:
            raise RefusedUpdate("norm", f"{state}: expected a norm up to {self.max_norm:g}, got {norm:.3g}")
        return norm
