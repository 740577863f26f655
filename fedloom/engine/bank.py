"""AdapterBank: one flat row of parameters and gradients per training job."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.engine.layout import AdapterLayout, Target
from fedloom.engine.runs import Runs
from fedloom.state import AdapterState


class AdapterBank:
    """Rows of adapters in full precision. A row is a training job (or an adapter to serve), not a client.

    `grads` exists only in a bank made for training. Layers add to it in the backward pass and never
    clear it; whoever takes the optimizer step does.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        adapters: Sequence[AdapterState],
        *,
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
    ):
        self.layout = layout
        rows = [layout.to_vector(adapter).to(device, dtype) for adapter in adapters]
        self.params = torch.stack(rows) if rows else torch.empty(0, layout.size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params) if training else None  # (rows, P), as params

    def state(self, row: int) -> AdapterState:
        return self.layout.to_state(self.params[row])


class RowGroup:
    """The factors of some rows side by side, in the precision the model computes in.

    Gathered once per target and kept, so a group is valid only until the bank's parameters change.
    """

    def __init__(self, bank: AdapterBank, rows: Sequence[int]):
        self.bank = bank
        self.rows = tuple(rows)
        self._index = torch.tensor(self.rows, dtype=torch.long, device=bank.params.device)
        self._factors: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}
        self._runs: tuple[Tensor, Runs] | None = None

    @property
    def width(self) -> int:
        """Columns of all rows together."""
        return len(self.rows) * self.bank.layout.spec.rank

    def runs(self, owner: Tensor) -> Runs:
        """The tokens of `owner` row by row. Remembers the last: each layer of a pass asks for the same."""
        if self._runs is None or self._runs[0] is not owner:
            self._runs = owner, Runs.of(owner, len(self.rows))
        return self._runs[1]

    def factors(self, target: Target, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """A (k, r, in) and B (k, out, r), of which B holds the scale times `gain`; B's memory is (out, k, r)."""
        key = target.name, gain
        if key not in self._factors:
            flat = self.bank.params
            a = target.a(flat).index_select(0, self._index)
            b = target.b(flat).index_select(0, self._index) * (target.scale * gain)
            beside = b.transpose(0, 1).to(dtype)
            self._factors[key] = a.to(dtype), beside.contiguous().transpose(0, 1)
        return self._factors[key]

    def add_gradient(self, target: Target, da: Tensor, db: Tensor, gain: float = 1.0) -> None:
        """Add the gradients of `factors` with that gain to the bank: da (k, r, in), db (k, out, r)."""
        grads = self.bank.grads
        assert grads is not None
        target.a(grads).index_add_(0, self._index, da.to(grads.dtype))
        target.b(grads).index_add_(0, self._index, db.to(grads.dtype) * (target.scale * gain))
