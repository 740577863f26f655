"""LoRA for many rows over one frozen linear map.

The layers are put into the model once. What they do depends on the pass in force (`ActivePass`): which
bank row each token belongs to. Without a pass the model is the untouched base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.engine.layout import AdapterLayout, Target
from fedloom.engine.packing import Pass


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
        anchor = self.active.anchor
        if self.target.kind == "opaque":
            return self.base(x) + _Lora.apply(x, anchor, None, None, self.target, lora)
        weight = self.base.weight.t() if self.target.kind == "linear" else self.base.weight  # (in, out)
        return _Lora.apply(x, anchor, weight, self.base.bias, self.target, lora)


class _Lora(torch.autograd.Function):
    """y = x W + bias + scale B A dropout(x), row by row; without W only the last term.

    The gradients of A and B go straight into the bank. The pass travels in `ctx`, so a backward pass,
    or a recomputed forward, can only ever see the pass it belongs to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Target,
        lora: Pass,
    ) -> Tensor:
        tokens = x.reshape(-1, target.inputs)  # (T, in)
        if weight is None:
            y = tokens.new_zeros(len(tokens), target.outputs)
        else:
            y = tokens @ weight if bias is None else torch.addmm(bias, tokens, weight)  # (T, out)
        keep = lora.dropout.keep(target.name, target.inputs) if lora.dropout else None
        a, b = lora.group.factors(target, x.dtype)  # (k*r, in), (out, k*r)
        z = _dropped(tokens, keep, lora)
        if lora.select is not None:
            h = (z @ a.t()).mul_(lora.select)  # (T, k*r)
            y.addmm_(h, b.t())
        else:
            h = tokens.new_zeros(len(tokens), target.rank)  # (T, r), each token's own columns only
            for columns, members in _rows(target, lora):
                h[members] = z[members] @ a[columns].t()
                y.index_add_(0, members, h[members] @ b[:, columns].t())
        ctx.save_for_backward(tokens, weight, keep, a, b, h)
        ctx.target, ctx.lora, ctx.shape = target, lora, x.shape
        return y.view(*x.shape[:-1], target.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        tokens, weight, keep, a, b, h = ctx.saved_tensors
        target: Target = ctx.target
        lora: Pass = ctx.lora
        dy = grads[0].reshape(-1, target.outputs)  # (T, out)
        z = _dropped(tokens, keep, lora)
        if lora.select is not None:
            dh = (dy @ b).mul_(lora.select)  # (T, k*r)
            da, db = dh.t() @ z, dy.t() @ h
            dz = dh @ a if ctx.needs_input_grad[0] else dh.new_empty(0)  # (T, in)
        else:
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            dz = torch.zeros_like(tokens)
            for columns, members in _rows(target, lora):
                own = dy[members]
                dh = own @ b[:, columns]  # (members, r)
                da[columns] = dh.t() @ z[members]
                db[:, columns] = own.t() @ h[members]
                dz[members] = dh @ a[columns]
        lora.group.add_gradient(target, da, db)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        dx = _dropped(dz, keep, lora)
        if weight is not None:
            dx = dx.addmm_(dy, weight.t())
        return dx.view(ctx.shape), None, None, None, None, None


def _dropped(x: Tensor, keep: Tensor | None, lora: Pass) -> Tensor:
    return x if keep is None or lora.dropout is None else x * keep * lora.dropout.gain


def _rows(target: Target, lora: Pass) -> Iterator[tuple[slice, Tensor]]:
    for index, members in enumerate(lora.members):
        yield slice(index * target.rank, (index + 1) * target.rank), members


def inject(model: nn.Module, layout: AdapterLayout, active: ActivePass) -> None:
    """Freeze the model and put a `GroupedLora` around each target, once and for good."""
    model.requires_grad_(False)
    for target in layout:
        parent, _, child = target.name.rpartition(".")
        module = model.get_submodule(target.name)
        setattr(model.get_submodule(parent), child, GroupedLora(module, target, active))
