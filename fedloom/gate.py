"""The gate: one check in front of every update, wherever it comes from.

A refused client is left out of this round with a reason code and counted; the round goes on.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from fedloom.errors import RefusedUpdate
from fedloom.messages import Broadcast, Update


def admit(update: Update, broadcast: Broadcast, admitted: Collection[str] = ()) -> Update:
    """The update itself, if it can be an answer to this broadcast.

    Codes: "duplicate", "weight", "keys", "shape", "dtype", "non-finite". The message names tensors
    and numbers, never text. Raises: RefusedUpdate.
    """
    if update.client in admitted:
        raise RefusedUpdate("duplicate", f"{update.client} has already answered round {broadcast.round}")
    if not (math.isfinite(update.weight) and update.weight >= 0):
        raise RefusedUpdate("weight", f"expected a finite weight >= 0, got {update.weight}")
    for state, vector in update.states.items():
        expected = broadcast.adapter
        if vector.keys() != expected.keys():
            odd = sorted(vector.keys() ^ expected.keys())
            raise RefusedUpdate(
                "keys", f"{state!r} differs from the broadcast in {len(odd)} tensors, first: {odd[0]!r}"
            )
        for name, tensor in vector.items():
            if tensor.shape != expected[name].shape:
                raise RefusedUpdate(
                    "shape",
                    f"{state}/{name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}",
                )
            if tensor.dtype != expected[name].dtype:
                raise RefusedUpdate(
                    "dtype", f"{state}/{name}: expected {expected[name].dtype}, got {tensor.dtype}"
                )
        if not vector.is_finite():
            raise RefusedUpdate("non-finite", f"{state!r} holds NaN or infinity")
    return update
