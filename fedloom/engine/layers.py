"""LoRA for many rows over one frozen linear map.

The layers are put into the model once. What they do depends on the pass in force (`ActivePass`): which
bank row each token belongs to. Without a pass the model is the unchanged base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedloom.engine.fp8 import Fp8Linear
from fedloom.engine.layout import AdapterLayout, Target
from fedloom.engine.packing import Pass
from fedloom.engine.segments import Segments

WORTH = 1 << 22  # multiplications a row, from which on a CPU a loop over rows pays


class ActivePass:
    """Where the layers of a model look up the current pass."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        # Makes autograd visit the layers although nothing they read requires a gradient: adapters live
        # in the bank, and the first layer's input is a frozen embedding.
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def using(self, lora: Pass | None) -> Iterator[None]:
        """Run forwards inside under `lora`: flattened, their tokens are `lora.owner`'s, in order.

        A backward pass may run outside: each layer keeps the pass it ran under.
        """
        before, self.current = self.current, lora
        try:
            yield
        finally:
            self.current = before


class GroupedLora(nn.Module):
    """A frozen linear map, plus for each token the low-rank update of the token's own row."""

    def __init__(self, base: Any, target: Target, active: ActivePass):
        nn.Module.__init__(self)
        self.base = base
        self.target = target
        self.active = active

    @property
    def weight(self) -> Any:
        """The frozen weight, for model code that asks it for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        lora = self.active.current
        if lora is None or not lora.group.rows:
            return self.base(x)
        base = self._base()
        y = _Lora.apply(x, self.active.anchor, base, self.target, lora)  # type: ignore[no-untyped-call]
        return y if base is not None else self.base(x) + y

    def _base(self) -> FrozenMap | None:
        if isinstance(self.base, Fp8Linear):
            return self.base
        if self.target.kind == "opaque":
            return None
        weight = self.base.weight.t() if self.target.kind == "linear" else self.base.weight  # (in, out)
        return _Matrix(weight, self.base.bias)


class FrozenMap(Protocol):
    """A linear map without gradients of its own, forward and backward, outside autograd. Both make a new tensor."""

    def product(self, x: Tensor) -> Tensor: ...  # (T, in) -> (T, out)
    def back(self, dy: Tensor) -> Tensor: ...  # (T, out) -> (T, in)


@dataclass(frozen=True)
class _Matrix:
    weight: Tensor  # (in, out)
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.t()


class _Lora(torch.autograd.Function):
    """y = x W + bias + scale B A dropout(x), row by row; without W only the last term.

    Frozen factors under the rows are added to W. The gradients of A and B go straight into the bank. The pass travels
    in `ctx`, so a backward pass, or a recomputed forward, can only ever see the pass it belongs to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, base: FrozenMap | None, target: Target, lora: Pass
    ) -> Tensor:
        tokens = x.reshape(-1, target.inputs)  # (T, in)
        y = tokens.new_zeros(len(tokens), target.outputs) if base is None else base.product(tokens)
        if (under := lora.under) is not None:
            segments = _segments(target, under)
            a, b = under.group.factors(target.name, x.dtype)
            _expand_b(y, _reduce_a(tokens, a, under, segments), b, segments)
        keep = lora.dropout.keep(target.name, target.inputs) if lora.dropout else None
        segments = _segments(target, lora)
        a, b = lora.group.factors(target.name, x.dtype, _gain(lora))  # (k, r, in), (k, out, r)
        z = tokens if keep is None else tokens * keep  # B scales the inputs that survive
        h = _reduce_a(z, a, lora, segments)
        _expand_b(y, h, b, segments)
        ctx.save_for_backward(tokens, keep, a, b, h)
        ctx.base, ctx.target, ctx.lora, ctx.shape = base, target, lora, x.shape
        return y.view(*x.shape[:-1], target.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        tokens, keep, a, b, h = ctx.saved_tensors
        target: Target = ctx.target
        lora: Pass = ctx.lora
        train, passes_on = lora.group.bank.train, ctx.needs_input_grad[0]
        dy = grads[0].reshape(-1, target.outputs)  # (T, out)
        segments = _segments(target, lora)
        own = dy if segments is None else segments.gather(dy)
        da = db = None
        if "B" in train:
            db = _outer_b(own, h, b, segments)
        if "A" not in train and not passes_on:
            lora.group.add_gradient(target, None, db, _gain(lora))
            return None, None, None, None, None
        dh = _reduce_b(own, b, lora, segments)
        if "A" in train:
            da = _outer_a(dh, tokens if keep is None else tokens * keep, a, segments)
        lora.group.add_gradient(target, da, db, _gain(lora))
        if not passes_on:
            return None, None, None, None, None
        dx = torch.zeros_like(tokens) if ctx.base is None else ctx.base.back(dy)  # (T, in)
        if (under := lora.under) is not None:
            below = _segments(target, under)
            frozen_a, frozen_b = under.group.factors(target.name, tokens.dtype)
            theirs = dy if below is None else below.gather(dy)
            _expand_a(dx, _reduce_b(theirs, frozen_b, under, below), frozen_a, below)
        dz = dx if keep is None else torch.zeros_like(tokens)
        _expand_a(dz, dh, a, segments)
        if keep is not None:
            dx += dz.mul_(keep)
        return dx.view(ctx.shape), None, None, None, None


# Each token's own columns only: (T, k*r), zero elsewhere, or (n, r) in the order of the segments.


def _reduce_a(z: Tensor, a: Tensor, lora: Pass, segments: Segments | None) -> Tensor:
    """A z: z (T, in), a (k, r, in)."""
    if segments is None:
        assert lora.select is not None
        return (z @ a.flatten(0, 1).t()).mul_(lora.select)
    return segments.times(segments.gather(z), a.transpose(1, 2))


def _expand_b(y: Tensor, h: Tensor, b: Tensor, segments: Segments | None) -> None:
    """Add B h to y (T, out); b (k, out, r)."""
    if segments is None:
        y.addmm_(h, _beside(b).t())
    else:
        segments.add_times_(y, h, b.transpose(1, 2))


def _reduce_b(own: Tensor, b: Tensor, lora: Pass, segments: Segments | None) -> Tensor:
    """B' dy: `own` is dy (T, out), gathered where there are segments; b (k, out, r)."""
    if segments is None:
        assert lora.select is not None
        return (own @ _beside(b)).mul_(lora.select)
    return segments.times(own, b)


def _expand_a(dz: Tensor, dh: Tensor, a: Tensor, segments: Segments | None) -> None:
    """Add A' dh to dz (T, in); a (k, r, in)."""
    if segments is None:
        dz.addmm_(dh, a.flatten(0, 1))
    else:
        segments.add_times_(dz, dh, a)


def _outer_a(dh: Tensor, z: Tensor, a: Tensor, segments: Segments | None) -> Tensor:
    """The gradient of A, (k, r, in): the sum over each row's tokens of dh z'."""
    return (dh.t() @ z).view(a.shape) if segments is None else segments.outer(dh, segments.gather(z))


def _outer_b(own: Tensor, h: Tensor, b: Tensor, segments: Segments | None) -> Tensor:
    """The gradient of B, (k, out, r): the sum over each row's tokens of dy h'."""
    if segments is None:
        return (own.t() @ h).view(own.shape[1], len(b), -1).transpose(0, 1)
    return segments.outer(own, h)


def _segments(target: Target, lora: Pass) -> Segments | None:
    """None: one masked product over all rows, which does k times the work in fewer and wider steps.

    On a GPU the number of steps decides; on a CPU the work, if there is enough of it: by segments, forward and backward
    of 288 x 288 at 4096 tokens and rank 8 take 0.83 of the time for 5 rows and 0.65 for 15.
    """
    group, tokens = lora.group, len(lora.owner)
    if lora.select is None:
        return group.segments(lora.owner)
    needless = tokens * (group.width - group.rank) * (target.inputs + target.outputs)
    if lora.owner.device.type != "cpu" or needless < WORTH * len(group.rows):
        return None
    segments = group.segments(lora.owner)
    return segments if segments.order is None else None


def _gain(lora: Pass) -> float:
    return 1.0 if lora.dropout is None else lora.dropout.gain


def _beside(b: Tensor) -> Tensor:
    """(k, out, r) -> (out, k*r), without a copy: the bank lays them out so."""
    return b.transpose(0, 1).flatten(1)


def inject(model: nn.Module, layout: AdapterLayout, active: ActivePass) -> None:
    """Freeze the model and put a `GroupedLora` around each target, once and for good."""
    model.requires_grad_(False)
    for target in layout:
        parent, _, child = target.name.rpartition(".")
        module = model.get_submodule(target.name)
        setattr(model.get_submodule(parent), child, GroupedLora(module, target, active))
