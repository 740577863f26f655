"""AdapterBank: one flat row of parameters and gradients per training job."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.engine.layout import AdapterLayout, Target
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
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Columns of all rows together."""
        return len(self.rows) * self.bank.layout.spec.rank

    def factors(self, target: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (rows*r, in) and B (out, rows*r); the scale is already in B."""
        if target.name not in self._factors:
            flat = self.bank.params
            a = target.a(flat).index_select(0, self._index).flatten(0, 1)  # (k*r, in)
            b = target.b(flat).index_select(0, self._index)  # (k, out, r)
            b = b.permute(1, 0, 2).flatten(1) * target.scale  # (out, k*r)
            self._factors[target.name] = (a.to(dtype), b.to(dtype))
        return self._factors[target.name]

    def add_gradient(self, target: Target, da: Tensor, db: Tensor) -> None:
        """Add the gradients of `factors` to the bank: da (k*r, in), db (out, k*r)."""
        grads = self.bank.grads
        assert grads is not None
        k, r = len(self.rows), target.rank
        da = da.view(k, r, target.inputs).to(grads.dtype)
        db = db.view(target.outputs, k, r).permute(1, 0, 2).to(grads.dtype) * target.scale
        target.a(grads).index_add_(0, self._index, da)
        target.b(grads).index_add_(0, self._index, db)
