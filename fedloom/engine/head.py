"""Logits and loss at labelled positions only, in chunks; no logits outlive their chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LOGITS = 1 << 23  # logits alive at a time: 32 MB in float32
_SMALLEST = 1e-30  # probability whose logarithm float32 still has to the last digit


@dataclass(frozen=True)
class LabelHead:
    """The output head of a causal LM, with the scaling or cap that some models apply to its logits."""

    linear: nn.Module
    scale: float
    softcap: float | None
    chunk: int  # rows at a time

    @classmethod
    def of(cls, model: Any) -> LabelHead:
        """Read Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma's `final_logit_softcapping`.

        A model that does something else to its logits fails the self-check.
        """
        config = model.config.get_text_config()
        linear = model.get_output_embeddings()
        vocabulary = linear.weight.shape[0]
        return cls(
            linear,
            getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
            max(64, min(1024, _LOGITS // vocabulary // 64 * 64)),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.linear(hidden)
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def nll(self, hidden: Tensor, at: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target given `hidden[at]`: hidden (T, d), at and targets (M,) -> (M,), at least float32."""
        return _LabelLoss.apply(hidden, at, targets, self)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def energy(self, hidden: Tensor, at: Tensor) -> Tensor:
        """-logsumexp of the logits given `hidden[at]`: hidden (T, d), at (M,) -> (M,), at least float32."""
        rows = hidden.index_select(0, at)  # (M, d)
        logits = (self.logits(rows[start : start + self.chunk]) for start in range(0, len(rows), self.chunk))
        return torch.cat([-z.to(torch.promote_types(z.dtype, torch.float32)).logsumexp(-1) for z in logits])

    @torch.no_grad()
    def token_statistics(self, hidden: Tensor, at: Tensor, targets: Tensor) -> Tensor:
        """log p of each target, then mean and deviation of log p under p itself, given `hidden[at]`: (M, 3)."""
        rows = hidden.index_select(0, at)  # (M, d)
        found: list[Tensor] = []
        for start in range(0, len(rows), self.chunk):
            part = slice(start, start + self.chunk)
            z = self.logits(rows[part])  # (chunk, V)
            logp = torch.log_softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
            p = logp.exp()
            target = logp.gather(1, targets[part, None])
            logp.masked_fill_(p == 0, 0.0)  # 0 log 0 is 0, also where a model rules a token out
            mean = (p * logp).sum(-1, keepdim=True)
            std = (p * (logp - mean).square()).sum(-1, keepdim=True).sqrt()
            found.append(torch.cat([target, mean, std], -1))
        return torch.cat(found)


class _LabelLoss(torch.autograd.Function):
    """The gradient for `hidden` is made in the forward pass, while the logits of a chunk are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, at: Tensor, targets: Tensor, head: LabelHead) -> Tensor:
        rows = hidden.index_select(0, at)  # (M, d)
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(rows) if wanted else None
        nll: list[Tensor] = []
        for start in range(0, len(rows), head.chunk):
            part = slice(start, start + head.chunk)
            target = targets[part, None]
            with torch.enable_grad() if wanted else torch.no_grad():
                x = rows[part].detach().requires_grad_(wanted)
                z = head.logits(x)  # (chunk, V)
            full = z.detach().to(torch.promote_types(z.dtype, torch.float32))
            if slopes is None:
                nll.append(-torch.log_softmax(full, -1).gather(1, target)[:, 0])
                continue
            p = torch.softmax(full, -1)  # one pass over the logits instead of two; the loss comes from p
            said = p.gather(1, target)
            vanished = said[:, 0] < _SMALLEST
            said = said.log_()
            if vanished.any():
                said[vanished] = torch.log_softmax(full[vanished], -1).gather(1, target[vanished])
            nll.append(-said[:, 0])
            dz = p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            (slopes[part],) = torch.autograd.grad(z, x, dz.to(z.dtype))
        ctx.save_for_backward(at, slopes)
        ctx.shape = hidden.shape
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        at, slopes = ctx.saved_tensors
        dhidden = slopes.new_zeros(ctx.shape)
        # Not index_add_, which adds in any order on CUDA: a token may be labelled more than once.
        dhidden.index_put_((at,), slopes * grads[0][:, None].to(slopes.dtype), accumulate=True)
        return dhidden, None, None, None


@torch.no_grad()
def reachable(model: Any, token: int) -> bool:
    """Can this token be the likeliest, with the output head as it is?

    Its row must win in its own direction, seen from the mean of all rows. A token that was added to the vocabulary and
    never trained does not, since other rows reach further that way. A bias and quantised heads are not examined.
    """
    weight = model.get_output_embeddings().weight  # (V, d)
    if not weight.is_floating_point() or weight.dim() != 2 or weight.dtype.itemsize < 2:
        return True
    direction = weight[token].float() - weight.mean(0, dtype=torch.float32)  # (d,)
    return bool((weight @ direction.to(weight.dtype)).argmax() == token)
