"""Frozen linear maps in 8-bit floating point, multiplied as such by tensor cores that can: an opt-in for speed.

Weights are e4m3 numbers with one scale per output channel, made once. Activations (forward) and gradients (backward)
are e4m3 with one scale per token, made anew each time. Gradients are e4m3 too, not the wider e5m2: with a scale per
token the range suffices, and the third bit of precision halves their error. The backward product sums over the
channels, so their scales are first multiplied into the gradient. Both products read along the summed axis, so the
device keeps a second, transposed copy: this saves time, not memory. Without such a product on the device, weights are
converted back a few channels at a time, which is slow and keeps activations exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # in e4m3
_STEP = 16  # the products want multiples of it
_CHUNK = 1 << 22  # weights made whole at a time
_ERROR = 0.08  # of a product in 8 bits; what is due to rounding is a third of it
_in_8_bits = True  # see whole_weights


class Fp8Linear(nn.Linear):
    """Computes as `linear` does, to about two digits. It is an nn.Linear because PEFT and our layout look for one.

    The weight is held as bytes, which no `.to(dtype)` changes.
    """

    scale: Tensor  # (out, 1) float32

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = _quantised(linear.weight.detach().float())
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)  # (out, in)
        self.bias = linear.bias
        self.register_buffer("scale", scale, persistent=False)
        self._turned: Tensor | None = None  # (in, out), for the gradient's product

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)  # type: ignore[no-untyped-call]

    def product(self, x: Tensor) -> Tensor:
        """x W + bias, outside autograd: (T, in) -> (T, out)."""
        if has_product(x):
            y = _multiply(x, self.codes, self.scale)
        else:
            y = torch.cat([x @ whole.t() for _, whole in self._whole(x.dtype)], 1)
        return y if self.bias is None else y.add_(self.bias)

    def back(self, dy: Tensor) -> Tensor:
        """The gradient of x from that of `product`, outside autograd: (T, out) -> (T, in)."""
        if has_product(dy):
            if self._turned is None or self._turned.device != dy.device:
                self._turned = self.weight.t().contiguous()
            ones = self.scale.new_ones(self.in_features, 1)
            return _multiply(dy, self._turned.view(E4M3), ones, channels=self.scale.t())
        dx = dy.new_zeros(len(dy), self.in_features)
        for part, whole in self._whole(dy.dtype):
            dx.addmm_(dy[:, part], whole)
        return dx

    @property
    def codes(self) -> Tensor:
        return self.weight.view(E4M3)

    def _whole(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some channels after others: which, and their weights (channels, in)."""
        step = max(1, _CHUNK // self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            yield part, self.codes[part].to(dtype) * self.scale[part].to(dtype)


class _Product(torch.autograd.Function):
    """For maps without LoRA; the others are multiplied by their own function (layers.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Fp8Linear) -> Tensor:
        ctx.linear, ctx.shape = linear, x.shape
        return linear.product(x.reshape(-1, linear.in_features)).view(*x.shape[:-1], linear.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.back(grads[0].reshape(-1, ctx.linear.out_features)).view(ctx.shape), None


def quantise(model: Any) -> None:
    """Put every linear map of `model` but its output head into 8 bits, in place, one after the other.

    Maps whose sizes are not multiples of 16 stay as they are. Raises ModelError, with the reason, where the result
    would not be usable.
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ModelError(
            f'quantize="fp8" knows nn.Linear, and {type(model).__name__} is made of Conv1D: leave quantize out.'
        )
    if reason := refused(model.device, model.dtype):
        raise ModelError(f'quantize="fp8": {reason}')
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        sizes_fit = type(module) is nn.Linear and not (
            module.in_features % _STEP or module.out_features % _STEP
        )
        if sizes_fit and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(module))
    if reason := _mismatch([module for module in model.modules() if isinstance(module, Fp8Linear)]):
        raise ModelError(f'quantize="fp8": {reason}; leave quantize out.')


@torch.no_grad()
def _mismatch(linears: list[Fp8Linear]) -> str | None:
    """Do products in 8 bits agree with those of whole weights? Checked on one map of each size."""
    for size, linear in {linear.weight.shape: linear for linear in linears}.items():
        stream = torch.Generator().manual_seed(0)
        for multiply, width in ((linear.product, linear.in_features), (linear.back, linear.out_features)):
            x = torch.randn(4 * _STEP, width, generator=stream).to(linear.weight.device, torch.bfloat16)
            if not has_product(x):
                return None
            try:
                got = multiply(x)
            except RuntimeError as error:
                return f"this device does not multiply {tuple(size)}: {str(error).splitlines()[0]}"
            with whole_weights():
                wanted = multiply(x)
            off = float((got - wanted).norm() / wanted.norm())
            if not off <= _ERROR:
                return f"this device multiplies {tuple(size)} with a relative error of {off:.1e}"
    return None


def refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device cannot; None if it can, were it slowly (a CPU)."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"{device.type} has no 8-bit floating point; use CUDA, or leave quantize out."
    if dtype != torch.bfloat16:
        return f"its products end in bfloat16, and dtype is {dtype}: set dtype to bfloat16, or leave quantize out."
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"it needs compute capability 8.9 (Ada, Hopper) or newer, this device has {major}.{minor}."
    return None


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, no product is in 8 bits: activations and gradients are exact, and weights keep their 8-bit values.

    For comparing two paths through a model. In 8 bits the least difference grows to a few per cent a layer, since
    numbers near the edge between two codes fall to either side.
    """
    global _in_8_bits
    before, _in_8_bits = _in_8_bits, False
    try:
        yield
    finally:
        _in_8_bits = before


def has_product(x: Tensor) -> bool:
    """Whether to multiply e4m3 numbers: torch does on the device of `x`, ending in its dtype."""
    if not _in_8_bits or not x.is_cuda:
        return False
    return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _multiply(x: Tensor, codes: Tensor, scale: Tensor, channels: Tensor | None = None) -> Tensor:
    """x (T, K), first times `channels` (1, K), and codes (N, K) with scale (N, 1) -> (T, N)."""
    quantised = _fused() if x.is_cuda else _quantised
    mine, by_token = quantised(x.detach().contiguous(), channels)
    # Fast accumulation keeps 14 bits of a product of two numbers of 4: nothing is lost by it.
    return torch._scaled_mm(mine, codes.t(), by_token, scale.t(), out_dtype=x.dtype, use_fast_accum=True)


def _quantised(x: Tensor, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 numbers like x (N, K), and what each row of them is to be multiplied with: (N, 1) float32."""
    if channels is not None:
        x = x * channels.to(x.dtype)
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float().clamp_min(1e-12)
    factor = torch.exp2(
        torch.floor(torch.log2(_LARGEST / largest))
    )  # a power of two: x is rounded once, to e4m3
    return (x * factor.to(x.dtype)).to(E4M3), factor.reciprocal()


@lru_cache(maxsize=1)
def _fused() -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """`_quantised` in one kernel, where torch can compile one (it wants triton and a C compiler).

    Unfused, it takes four passes over the activations, which cost about as much as 8-bit products save.
    """
    compiled = torch.compile(_quantised, dynamic=True)
    try:
        compiled(torch.ones(2 * _STEP, _STEP, dtype=torch.bfloat16, device="cuda"), None)
    except Exception:  # whatever is missing, it can be done without
        return _quantised
    return compiled
