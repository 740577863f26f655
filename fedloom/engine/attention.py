"""Each example of a packed batch attends only to itself and to the prefix it shares with others.

Registered with transformers under `NAME`. The packed batch arrives as an argument of the model's forward, is
handed down by the model, and so is the same when a layer is recomputed. Sliding windows, score softcaps,
grouped keys and any scale are honoured; arguments that this function does not know are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fedloom.engine import varlen
from fedloom.engine.planner import ragged_sizes
from fedloom.errors import ModelError

NAME = "fedloom"
DENSE_LENGTH = 512  # longest example for which all scores are kept; beyond it, flash kernels
PART_LENGTH = 64  # queries at a time in float32, from twice as many on; others, twice as many
_UNKNOWN = ("s_aux", "position_bias", "head_mask")  # sinks, T5 and ALiBi biases


@dataclass(frozen=True)
class Span:
    """Adjacent tokens that see each other and, before them, one span elsewhere in the row."""

    own: slice
    prefix: slice  # empty: nothing is before them

    def seen(self, x: Tensor) -> Tensor:
        """The part of x that the span attends to: x (H, T, D) -> (H, p + n, D)."""
        own = x[:, self.own]
        return own if self.prefix.start == self.prefix.stop else torch.cat([x[:, self.prefix], own], 1)

    def collect(self, total: Tensor, part: Tensor) -> None:
        """The transpose of `seen`, for spans one after another: part (H, p + n, D) goes into total (T, H, D)."""
        p = self.prefix.stop - self.prefix.start
        total[self.own] = part[:, p:].transpose(0, 1)
        if p:
            total[self.prefix] += part[:, :p].transpose(0, 1)

    def parts(self, length: int) -> list[tuple[slice, int, int]]:
        """Queries in parts of `length` or more: where they lie, and their range among the keys seen.

        The last ones, which see all keys, come first.
        """
        p, n = self.prefix.stop - self.prefix.start, self.own.stop - self.own.start
        count = max(1, n // length)
        edges = [n * i // count for i in range(count, -1, -1)]
        return [
            (slice(self.own.start + start, self.own.start + end), p + start, p + end)
            for end, start in pairwise(edges)
        ]


@dataclass
class Blocks:
    """The examples of one packed batch, and what the attention layers asked for on the way."""

    lengths: tuple[int, ...]
    prefixes: tuple[tuple[int, int], ...] = ()  # for each, start and length of what comes before it
    windows: list[int | None] = field(default_factory=list)  # one entry a call

    def spans(self) -> list[Span]:
        ends = list(accumulate(self.lengths))
        prefixes = self.prefixes or ((0, 0),) * len(ends)
        return [
            Span(slice(end - n, end), slice(start, start + p))
            for end, n, (start, p) in zip(ends, self.lengths, prefixes, strict=True)
        ]

    @property
    def longest(self) -> int:
        """The most keys that any token sees."""
        prefixes = self.prefixes or ((0, 0),) * len(self.lengths)
        return max(n + p for n, (_, p) in zip(self.lengths, prefixes, strict=True))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    blocks: Blocks | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D). Padding at the end yields zeros."""
    if blocks is None:
        raise ModelError("the model does not hand its arguments down to its attention")
    if odd := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise ModelError(f"unsupported term in the scores: {', '.join(odd)}")
    if attention_mask is not None:
        raise ModelError("the model brings a mask of its own")
    if not getattr(module, "is_causal", True) or dropout:
        raise ModelError("only causal attention without dropout is supported")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(f"expected one packed row, got queries {tuple(query.shape)}")
    blocks.windows.append(sliding_window)
    longest = blocks.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cap = softcap or None
    if cap is not None or (query.device.type == "cpu" and longest <= DENSE_LENGTH):
        return _Dense.apply(query, key, value, blocks, scale, window, cap), None  # type: ignore[no-untyped-call]
    if varlen.fits(query, key, value):
        fused = varlen.varlen(
            query, key, value, blocks.lengths, scale=scale, window=window, prefixes=blocks.prefixes
        )
        return fused, None
    parts: list[Tensor] = []
    for span in blocks.spans():
        q, k, v = query[:, :, span.own], span.seen(key[0])[None], span.seen(value[0])[None]
        n, seen = q.shape[2], k.shape[2]
        plain = window is None and n == seen
        visible = None if plain else _visible(seen, window, q.device)[seen - n :]
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=plain, scale=scale, enable_gqa=True
            )
        )
    padding = query.shape[2] - sum(blocks.lengths)
    parts.append(query.new_zeros(1, query.shape[1], padding, value.shape[-1]))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def _visible(n: int, window: int | None, device: torch.device) -> Tensor:
    """(n, n) bool: key j is visible to query i if i - window < j <= i."""
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril_()
    return causal if window is None else causal.triu_(1 - window)


class _Dense(torch.autograd.Function):
    """Example by example with all scores in memory: on a CPU faster than the fused kernels.

    The queries of a long example are split into parts, so that few scores of hidden keys are computed.
    """

    @staticmethod
    @ragged_sizes()
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        heads, total, kv_heads = query.shape[1], query.shape[2], key.shape[1]
        shared = heads // kv_heads  # queries that read the same key
        q, k, v = query[0] * scale, key[0], value[0]
        out = query.new_zeros(total, heads, value.shape[-1])
        length = _part_length(q)
        side = blocks.longest if window is not None else min(blocks.longest, 2 * length)
        hidden = ~_visible(side, window, query.device)
        bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(hidden, float("-inf"))
        saved: list[Tensor] = []
        for span in blocks.spans():
            keys, values = span.seen(k), span.seen(v)  # (H_kv, p + n, D)
            saved += [keys, values]
            for part, start, end in span.parts(length):
                n = end - start
                scores = torch.bmm(
                    q[:, part].reshape(kv_heads, shared * n, -1), keys[:, :end].transpose(1, 2)
                )
                if cap is not None:
                    saved.append(torch.tanh(scores / cap))
                    scores = saved[-1] * cap
                _hide(scores.view(kv_heads, shared, n, end), window, bias)
                weights = torch.softmax(scores, -1)  # (H_kv, shared*n, end)
                out[part] = torch.bmm(weights, values[:, :end]).view(heads, n, -1).transpose(0, 1)
                saved.append(weights)
        ctx.save_for_backward(q, *saved)
        ctx.blocks, ctx.scale, ctx.cap, ctx.kv_heads = blocks, scale, cap, kv_heads
        return out[None]

    @staticmethod
    @ragged_sizes()
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, *saved = ctx.saved_tensors
        (heads, total, size), kv_heads = q.shape, ctx.kv_heads
        shared = heads // kv_heads
        dq = q.new_zeros(total, heads, size)
        dk = q.new_zeros(total, kv_heads, size)
        dv = q.new_zeros(total, kv_heads, grads[0].shape[-1])
        remaining = iter(saved)
        for span in ctx.blocks.spans():
            keys, values = next(remaining), next(remaining)  # (H_kv, p + n, D)
            dkeys = dvalues = None
            for part, start, end in span.parts(_part_length(q)):
                n = end - start
                bent = None if ctx.cap is None else next(remaining)
                weights = next(remaining)  # (H_kv, shared*n, end)
                dout = grads[0][0, part].transpose(0, 1).reshape(kv_heads, shared * n, -1)
                dscores = torch._softmax_backward_data(
                    torch.bmm(dout, values[:, :end].transpose(1, 2)), weights, -1, weights.dtype
                )
                if bent is not None:
                    dscores = dscores * (1 - bent * bent)
                dq[part] = torch.bmm(dscores, keys[:, :end]).view(heads, n, -1).transpose(0, 1)
                queries = q[:, part].reshape(kv_heads, shared * n, -1)
                if dkeys is None or dvalues is None:
                    dkeys = torch.bmm(dscores.transpose(1, 2), queries)
                    dvalues = torch.bmm(weights.transpose(1, 2), dout)
                else:
                    dkeys[:, :end] += torch.bmm(dscores.transpose(1, 2), queries)
                    dvalues[:, :end] += torch.bmm(weights.transpose(1, 2), dout)
            span.collect(dk, dkeys)
            span.collect(dv, dvalues)
        dq.mul_(ctx.scale)
        return (*(d.transpose(0, 1)[None] for d in (dq, dk, dv)), None, None, None, None)


def _part_length(query: Tensor) -> int:
    return PART_LENGTH if query.dtype == torch.float32 else 2 * PART_LENGTH


def _hide(scores: Tensor, window: int | None, bias: Tensor) -> None:
    """Make later keys, and keys before the window, invisible: (..., n, end), where the last n keys are own."""
    n, end = scores.shape[-2:]
    if window is None:
        scores[..., end - n :].add_(bias[:n, :n])
    else:
        scores.add_(bias[end - n : end, :end])
