"""LoRA for many rows over one frozen linear map.

The layers are put into the model once. What they do depends on the pass in force (`ActivePass`): which
bank row each token belongs to. Without a pass the model is the untouched base.
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
from fedloom.engine.runs import Runs

WORTH = 1 << 22  # multiplications a row that, on a CPU, are worth its calls


class ActivePass:
    """The one place where the layers of a model look up the current pass."""

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
        frozen = self._frozen()
        y = _Lora.apply(x, self.active.anchor, frozen, self.target, lora)
        return y if frozen is not None else self.base(x) + y

    def _frozen(self) -> Frozen | None:
        if isinstance(self.base, Fp8Linear):
            return self.base
        if self.target.kind == "opaque":
            return None
        weight = self.base.weight.t() if self.target.kind == "linear" else self.base.weight  # (in, out)
        return _Matrix(weight, self.base.bias)


class Frozen(Protocol):
    """A linear map that needs no gradient, both ways and outside autograd. Both make a new tensor."""

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

    The gradients of A and B go straight into the bank. The pass travels in `ctx`, so a backward pass,
    or a recomputed forward, can only ever see the pass it belongs to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, frozen: Frozen | None, target: Target, lora: Pass
    ) -> Tensor:
        tokens = x.reshape(-1, target.inputs)  # (T, in)
        y = tokens.new_zeros(len(tokens), target.outputs) if frozen is None else frozen.product(tokens)
        keep = lora.dropout.keep(target.name, target.inputs) if lora.dropout else None
        a, b = lora.group.factors(target, x.dtype, _gain(lora))  # (k, r, in), (k, out, r)
        z = tokens if keep is None else tokens * keep  # what survives is scaled by B
        if (runs := _runs(target, lora)) is None:
            assert lora.select is not None
            h = (z @ a.flatten(0, 1).t()).mul_(lora.select)  # (T, k*r)
            y.addmm_(h, _beside(b).t())
        else:
            h = runs.times(runs.gather(z), a.transpose(1, 2))  # (n, r), each token's own columns only
            runs.add_times_(y, h, b.transpose(1, 2))
        ctx.save_for_backward(tokens, keep, a, b, h)
        ctx.frozen, ctx.target, ctx.lora, ctx.shape = frozen, target, lora, x.shape
        return y.view(*x.shape[:-1], target.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        tokens, keep, a, b, h = ctx.saved_tensors
        target: Target = ctx.target
        lora: Pass = ctx.lora
        dy = grads[0].reshape(-1, target.outputs)  # (T, out)
        z = tokens if keep is None else tokens * keep
        if (runs := _runs(target, lora)) is None:
            assert lora.select is not None
            dh = (dy @ _beside(b)).mul_(lora.select)  # (T, k*r)
            da = (dh.t() @ z).view(a.shape)
            db = (dy.t() @ h).view(target.outputs, len(b), -1).transpose(0, 1)  # (k, out, r)
        else:
            own = runs.gather(dy)
            dh = runs.times(own, b)  # (n, r)
            da, db = runs.outer(dh, runs.gather(z)), runs.outer(own, h)
        lora.group.add_gradient(target, da, db, _gain(lora))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        dx = torch.zeros_like(tokens) if ctx.frozen is None else ctx.frozen.back(dy)  # (T, in)
        dz = dx if keep is None else torch.zeros_like(tokens)
        if runs is None:
            dz.addmm_(dh, a.flatten(0, 1))
        else:
            runs.add_times_(dz, dh, a)
        if keep is not None:
            dx += dz.mul_(keep)
        return dx.view(ctx.shape), None, None, None, None


def _runs(target: Target, lora: Pass) -> Runs | None:
    """None: one masked product over all rows, which does k times the work in fewer and wider steps.

    On a GPU the steps count. On a CPU the work does, where there is enough of it: forward and backward of 288 x 288
    at 4096 tokens and rank 8 take 0.83 of the time for 5 rows and 0.65 for 15.
    """
    group, tokens = lora.group, len(lora.owner)
    if lora.select is None:
        return group.runs(lora.owner)
    needless = tokens * (group.width - target.rank) * (target.inputs + target.outputs)
    if lora.owner.device.type != "cpu" or needless < WORTH * len(group.rows):
        return None
    runs = group.runs(lora.owner)
    return runs if runs.order is None else None


def _gain(lora: Pass) -> float:
    return 1.0 if lora.dropout is None else lora.dropout.gain


def _beside(b: Tensor) -> Tensor:
    """(k, out, r) -> (out, k*r); no copy, as that is how the bank lays them."""
    return b.transpose(0, 1).flatten(1)


def inject(model: nn.Module, layout: AdapterLayout, active: ActivePass) -> None:
    """Freeze the model and put a `GroupedLora` around each target, once and for good."""
    model.requires_grad_(False)
    for target in layout:
        parent, _, child = target.name.rpartition(".")
        module = model.get_submodule(target.name)
        setattr(model.get_submodule(parent), child, GroupedLora(module, target, active))
