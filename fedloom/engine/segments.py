"""Tokens sorted by row, multiplied by one matrix a row: in one grouped kernel where torch has one, else in a loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.engine.planner import ragged_sizes

_GROUPED = getattr(F, "grouped_mm", None)  # since torch 2.10
_ALIGNED = 8  # bfloat16 numbers in 16 bytes: the kernel wants every line to begin at a multiple of that


@dataclass(frozen=True)
class Segments:
    """Which tokens of a pass belong to which row. Matrices come one a row: (rows, ., .)."""

    # (n,) int64, the tokens that belong to a row, row by row; None: the first n, as they lie
    order: Tensor | None
    ends: tuple[int, ...]  # for each row, where its tokens end in that order; the last is n
    offsets: Tensor  # (rows,) int32, `ends` where the tokens are

    @classmethod
    def of(cls, owner: Tensor, rows: int) -> Segments:
        """`owner` (T,) int64 holds each token's row in 0 ... rows - 1, or -1 for none."""
        key = torch.where(owner < 0, rows, owner)  # tokens without a row last
        offsets = torch.bincount(key, minlength=rows + 1)[:rows].cumsum(0)
        orderly = (key[1:] >= key[:-1]).all()
        *ends, as_they_lie = torch.cat([offsets, orderly[None]]).tolist()  # the one wait for the device
        order = None if as_they_lie else torch.argsort(key, stable=True)[: ends[-1]]
        return cls(order, tuple(ends), offsets.to(torch.int32))

    def gather(self, x: Tensor) -> Tensor:
        """(T, K) -> (n, K), row by row."""
        return x[: self.ends[-1]] if self.order is None else x.index_select(0, self.order)

    @ragged_sizes()
    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x (n, K), matrices (rows, K, N) -> (n, N)."""
        if _one_kernel(x, matrices):
            return _GROUPED(x, matrices, offs=self.offsets)  # type: ignore[misc]
        y = x.new_empty(len(x), matrices.shape[2])
        for row, mine in self:
            torch.mm(x[mine], matrices[row], out=y[mine])
        return y

    @ragged_sizes()
    def add_times_(self, y: Tensor, x: Tensor, matrices: Tensor) -> None:
        """Add `times` to y (T, N), where those tokens are."""
        if self.order is not None:
            y.index_add_(0, self.order, self.times(x, matrices))
        elif _one_kernel(x, matrices):
            y[: len(x)].add_(self.times(x, matrices))
        else:
            for row, mine in self:
                y[mine].addmm_(x[mine], matrices[row])

    @ragged_sizes()
    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum over each row's tokens of their outer products: x (n, K), y (n, N) -> (rows, K, N)."""
        if _one_kernel(x, y):
            return _GROUPED(x.t(), y, offs=self.offsets)  # type: ignore[misc]
        sums = x.new_zeros(len(self.ends), x.shape[1], y.shape[1])
        for row, mine in self:
            torch.mm(x[mine].t(), y[mine], out=sums[row])
        return sums

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """The rows that have tokens, and where these lie in `order`."""
        start = 0
        for row, end in enumerate(self.ends):
            if end > start:
                yield row, slice(start, end)
            start = end


def _one_kernel(x: Tensor, y: Tensor) -> bool:
    """Whether torch has a real kernel for these, not a loop: bfloat16 on Hopper and data-centre Blackwell."""
    if _GROUPED is None or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return _aligned(x, y) and torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))


def _aligned(x: Tensor, y: Tensor) -> bool:
    return not any(stride % _ALIGNED for z in (x, y) for stride in z.stride() if stride != 1)
