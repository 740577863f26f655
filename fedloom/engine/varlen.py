"""Attention within the examples of a packed row in one kernel call: variable-length flash attention on CUDA.

The kernel aligns causal masks and windows to the end of the keys (bottom right). So an example that continues a
prefix elsewhere in the row needs no mask: its keys are the prefix's and its own, its queries only its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

try:
    import torch.nn.attention.varlen  # registers torch.ops.torch_attn

    _ARGUMENTS = torch.ops.torch_attn._varlen_attn.default._schema.arguments
    _KERNEL = "window_size" in {argument.name for argument in _ARGUMENTS}
except ImportError:
    _KERNEL = False  # before torch 2.11

Prefix = tuple[int, int]  # where it starts in the row, and its length; length 0: none


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen` can run on these, (1, H, T, D) and (1, H_kv, T, D): torch's own rules for flash attention.

    It wants a CUDA device of compute capability 8.0 or newer, float16 or bfloat16, and heads of one size up to
    256; the variable-length kernel also wants that size to be a multiple of 8. Any scale and window will do.
    """
    if not _KERNEL or not query.is_cuda or query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, True))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    prefixes: Sequence[Prefix] | None = None,
) -> Tensor:
    """query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D), zeros behind the last example.

    `lengths` are those of the examples, all positive, end to end from the start of the row. Key j is visible to
    query i if i - window < j <= i, counted in the example with its prefix in front. A prefix may be the tokens
    of another example, or part of them; `prefixes` has one entry for each example. Gradients repeat to the bit.
    """
    spans = _spans(tuple(lengths), tuple(prefixes or ()), query.device)
    total = query.shape[2]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if spans.keys is not None:
        # Not index_select: its backward adds in any order on CUDA, and a prefix is read many times.
        k, v = k[spans.keys], v[spans.keys]
    # the kernel's window counts the keys before the query's own; (-1, 0) is plain causal
    left = -1 if window is None else window - 1
    how = (spans.query_ends, spans.key_ends, spans.longest_query, spans.longest_key, scale, left)
    out = _Varlen.apply(q[: spans.tokens], k, v, *how)  # type: ignore[no-untyped-call]  # (sum of lengths, H, D)
    return F.pad(out, (0, 0, 0, 0, 0, total - spans.tokens))[None]


@dataclass(frozen=True)
class _Spans:
    tokens: int
    keys: Tensor | None  # (sum of prefixes and lengths,) int64 into the row; None: keys lie as queries do
    query_ends: Tensor  # (examples + 1,) int32
    key_ends: Tensor  # (examples + 1,) int32
    longest_query: int
    longest_key: int


# Every layer of a pass asks for the same; a copy to the device each time would wait for it.
@lru_cache(maxsize=8)
def _spans(lengths: tuple[int, ...], prefixes: tuple[Prefix, ...], device: torch.device) -> _Spans:
    ends = list(accumulate(lengths, initial=0))
    if not any(length for _, length in prefixes):
        at = torch.tensor(ends, dtype=torch.int32, device=device)
        return _Spans(ends[-1], None, at, at, max(lengths), max(lengths))
    parts: list[Tensor] = []
    for start, n, (first, count) in zip(ends, lengths, prefixes, strict=False):
        parts += [torch.arange(first, first + count), torch.arange(start, start + n)]
    key_lengths = [n + count for n, (_, count) in zip(lengths, prefixes, strict=True)]
    return _Spans(
        ends[-1],
        torch.cat(parts).to(device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(list(accumulate(key_lengths, initial=0)), dtype=torch.int32, device=device),
        max(lengths),
        max(key_lengths),
    )


class _Varlen(torch.autograd.Function):
    """`torch.nn.attention.varlen.varlen_attn`, except that its gradients are summed in a fixed order.

    Only torch's global switch makes it keep that order, and the switch refuses or slows down other operations. So it
    is on for this one kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_key: int,
        scale: float,
        left: int,
    ) -> Tensor:
        ctx.how = (longest_query, longest_key, left < 0)
        ctx.scale, ctx.window = scale, [left, 0]
        out, lse, state = torch.ops.torch_attn._varlen_attn(
            query, key, value, query_ends, key_ends, *ctx.how, scale, ctx.window
        )
        ctx.save_for_backward(query, key, value, out, lse, query_ends, key_ends, state)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, state = ctx.saved_tensors
        with _fixed_order():
            found = torch.ops.torch_attn._varlen_attn_backward(
                grads[0].contiguous(), *saved, *ctx.how, state, ctx.scale, ctx.window
            )
        return *found, None, None, None, None, None, None


@contextmanager
def _fixed_order() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
