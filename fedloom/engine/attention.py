"""Each example of a packed batch attends to itself only.

Registered with transformers under `NAME`. The packed batch arrives as an argument of the model's forward, is
handed down by the model, and so is the same when a layer is recomputed. Sliding windows, score softcaps,
grouped keys and any scale are honoured; what this function does not know it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fedloom.errors import ModelError

NAME = "fedloom"
DENSE_LENGTH = 512  # longest example for which all scores are kept; beyond it, flash kernels
_UNKNOWN = ("s_aux", "position_bias", "head_mask")  # sinks, T5 and ALiBi biases


@dataclass
class Blocks:
    """The examples of one packed batch, and what the attention layers asked for on the way."""

    lengths: tuple[int, ...]
    windows: list[int | None] = field(default_factory=list)  # one entry a call


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
    longest = max(blocks.lengths)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cap = softcap or None
    if cap is not None or (query.device.type == "cpu" and longest <= DENSE_LENGTH):
        return _Dense.apply(query, key, value, blocks.lengths, scale, window, cap), None
    padding = query.shape[2] - sum(blocks.lengths)
    sizes = [*blocks.lengths, padding]
    parts: list[Tensor] = []
    *examples, rest = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    for q, k, v in examples:
        visible = None if window is None else _visible(q.shape[2], window, q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
            )
        )
    parts.append(rest[0].new_zeros(*rest[0].shape[:3], value.shape[-1]))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def _visible(n: int, window: int | None, device: torch.device) -> Tensor:
    """(n, n) bool: key j is visible to query i if i - window < j <= i."""
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril_()
    return causal if window is None else causal.triu_(1 - window)


class _Dense(torch.autograd.Function):
    """Example by example with all scores in memory: on a CPU faster than the fused kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        heads, total, kv_heads = query.shape[1], query.shape[2], key.shape[1]
        shared = heads // kv_heads  # queries that read the same key
        hidden = ~_visible(max(lengths), window, query.device)
        bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(hidden, float("-inf"))
        out = query.new_zeros(total, heads, value.shape[-1])
        saved: list[Tensor] = []
        for part, n in _parts(lengths):
            q = query[0, :, part].reshape(kv_heads, shared * n, -1)
            k, v = key[0, :, part], value[0, :, part]  # (H_kv, n, D)
            mask = bias[:n, :n] if shared == 1 else bias[:n, :n].repeat(shared, 1)
            if cap is None:
                scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
            else:
                saved.append(torch.tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / cap)))
                scores = saved[-1] * cap + mask
            weights = torch.softmax(scores, -1)  # (H_kv, shared*n, n)
            out[part] = torch.bmm(weights, v).view(heads, n, -1).transpose(0, 1)
            saved.append(weights)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.lengths, ctx.scale, ctx.cap = lengths, scale, cap
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        shared = heads // kv_heads
        dq, dk, dv = (
            torch.zeros(x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)  # (T, H, D)
            for x in (query, key, value)
        )
        remaining = iter(saved)
        for part, n in _parts(ctx.lengths):
            bent = next(remaining) if ctx.cap is not None else None
            weights = next(remaining)
            q = query[0, :, part].reshape(kv_heads, shared * n, -1)
            k, v = key[0, :, part], value[0, :, part]
            dout = grads[0][0, part].transpose(0, 1).reshape(kv_heads, shared * n, -1)
            dv[part] = torch.bmm(weights.transpose(1, 2), dout).transpose(0, 1)
            dscores = torch._softmax_backward_data(
                torch.bmm(dout, v.transpose(1, 2)), weights, -1, weights.dtype
            )
            if bent is not None:
                dscores = dscores * (1 - bent * bent)
            dq[part] = torch.bmm(dscores, k).view(heads, n, -1).transpose(0, 1)
            dk[part] = torch.bmm(dscores.transpose(1, 2), q).transpose(0, 1)
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        return (
            dq.transpose(0, 1)[None],
            dk.transpose(0, 1)[None],
            dv.transpose(0, 1)[None],
            None,
            None,
            None,
            None,
        )


def _parts(lengths: tuple[int, ...]) -> list[tuple[slice, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(slice(end - n, end), n) for end, n in zip(ends, lengths, strict=True)]
