"""AdapterBank: one flat row of parameters and gradients per training job. Rows may differ in rank and scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import lora
from fedloom.engine.layout import AdapterLayout, Target
from fedloom.engine.segments import Segments
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Factors, Fit, Frozen, Generate, Score


@dataclass(frozen=True)
class Tuning:
    """What one row adds to the base model: scale * B A, over frozen factors if there are any."""

    adapter: AdapterState | None = None  # None: zero
    scale: float | None = None  # None: the layout's
    frozen: Frozen | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"Expected a finite scale, got {self.scale}.")

    @classmethod
    def of(cls, request: Fit | Generate | Score) -> Tuning:
        return cls(request.adapter, request.scale, request.frozen)

    @property
    def is_base(self) -> bool:
        """Does it leave the base model as it is, so that it needs no row?"""
        return self.adapter is None and self.frozen is None

    def is_finite(self) -> bool:
        under = None if self.frozen is None else self.frozen.factors
        return all(part is None or part.is_finite() for part in (self.adapter, under))


class AdapterBank:
    """Rows of adapters in full precision. A row is a training job (or an adapter to serve), not a client.

    An adapter of lower rank than the layout's is filled up with zeros. Zero rows of A meet zero columns of B, so
    their gradients are exactly zero, and they stay zero under either optimizer and under weight decay.

    `grads` exists only in a bank made for training. Layers add to it in the backward pass and never clear it;
    whoever takes the optimizer step does. It holds the gradients of the factors that `train` names, else zeros.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        tunings: Sequence[Tuning],
        *,
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
        train: Factors = "AB",
        partial: bool = False,
    ):
        """`partial`: adapters may lack targets; there they are zero."""
        self.layout = layout
        self.train = train
        self.scales = [layout.spec.scale if t.scale is None else t.scale for t in tunings]
        self._ranks = [
            None if t.adapter is None else layout.ranks(t.adapter, partial=partial) for t in tunings
        ]
        rows = [
            torch.zeros(layout.size) if t.adapter is None else layout.to_vector(t.adapter, partial=partial)
            for t in tunings
        ]
        moved = [row.to(device, dtype) for row in rows]
        self.params = torch.stack(moved) if moved else torch.empty(0, layout.size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params) if training else None  # (rows, P), as params
        self.under = Under.of(layout, [tuning.frozen for tuning in tunings], dtype=dtype, device=device)

    def state(self, row: int) -> AdapterState:
        """The row's adapter, of the rank that it came with."""
        return self.layout.to_state(self.params[row], self._ranks[row])


@dataclass(frozen=True)
class Under:
    """The frozen factors under the rows of a bank; rows with equal factors share them."""

    group: RowGroup  # of all of them, for every pass, since they never change
    index: Tensor  # int64, row of the bank above -> row here, -1: none; the last, -1, is for the base model

    @classmethod
    def of(
        cls,
        layout: AdapterLayout,
        wanted: Sequence[Frozen | None],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Under | None:
        """None where there are none."""
        if not any(wanted):
            return None
        hashes = {id(f.factors): f.factors.sha256() for f in wanted if f is not None}
        keys = [None if f is None else (hashes[id(f.factors)], f.scale) for f in wanted]
        distinct = {key: f for key, f in zip(keys, wanted, strict=True) if f is not None}
        place = {key: row for row, key in enumerate(distinct)}
        ranks = [pair.rank for f in distinct.values() for pair in lora.pairs(f.factors).values()]
        bank = AdapterBank(
            layout.with_rank(max(ranks, default=1)),
            [Tuning(f.factors, f.scale) for f in distinct.values()],
            dtype=dtype,
            device=device,
            training=False,
            partial=True,
        )
        index = torch.tensor([place.get(key, -1) for key in keys] + [-1], device=device)
        return cls(RowGroup(bank, range(len(distinct))), index)


class RowGroup:
    """The factors of some rows side by side, in the precision the model computes in.

    Gathered once per target and cached, so a group is valid only until the bank's parameters change.
    """

    def __init__(self, bank: AdapterBank, rows: Sequence[int]):
        self.bank = bank
        self.rows = tuple(rows)
        self._index = torch.tensor(self.rows, dtype=torch.long, device=bank.params.device)
        scales = [bank.scales[row] for row in self.rows]
        self._scale: float | Tensor = scales[0] if scales else 1.0
        if len(set(scales)) > 1:
            self._scale = bank.params.new_tensor(scales)[:, None, None]  # (k, 1, 1)
        self._factors: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}
        self._segments: tuple[Tensor, Segments] | None = None

    @property
    def rank(self) -> int:
        return self.bank.layout.spec.rank

    @property
    def width(self) -> int:
        """Columns of all rows together."""
        return len(self.rows) * self.rank

    def segments(self, owner: Tensor) -> Segments:
        """The tokens of `owner` row by row. Remembers the last: each layer of a pass asks for the same."""
        if self._segments is None or self._segments[0] is not owner:
            self._segments = owner, Segments.of(owner, len(self.rows))
        return self._segments[1]

    def factors(self, name: str, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """A (k, r, in) and B (k, out, r) of a target; B holds the scale times `gain`, and its memory is (out, k, r)."""
        key = name, gain
        if key not in self._factors:
            target, flat = self.bank.layout[name], self.bank.params
            a = target.a(flat).index_select(0, self._index)
            b = target.b(flat).index_select(0, self._index) * (self._scale * gain)
            beside = b.transpose(0, 1).to(dtype)
            self._factors[key] = a.to(dtype), beside.contiguous().transpose(0, 1)
        return self._factors[key]

    def add_gradient(self, target: Target, da: Tensor | None, db: Tensor | None, gain: float = 1.0) -> None:
        """Add the gradients of `factors` with that gain to the bank: da (k, r, in), db (k, out, r); None: not trained."""
        grads = self.bank.grads
        assert grads is not None
        if da is not None:
            target.a(grads).index_add_(0, self._index, da.to(grads.dtype))
        if db is not None:
            target.b(grads).index_add_(0, self._index, db.to(grads.dtype) * (self._scale * gain))
