"""AdamW and SGD, row by row: each training job has its own step count, rate and clip.

The arithmetic is torch's, operation by operation. A row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.steps import LocalTraining


class RowOptimizer:
    """The state of one row; fresh for every Fit. Adam's moments, or SGD's momentum."""

    def __init__(self, local: LocalTraining):
        self._local = local
        self._moments: tuple[Tensor, ...] = ()
        self.steps = 0

    def step(self, params: Tensor, grad: Tensor) -> None:
        """Update `params` (P,) in place. `grad` (P,) is clipped in place first."""
        local, learning_rate = self._local, self._local.learning_rate
        if local.clip:
            norm = torch.linalg.vector_norm(grad)
            grad.mul_(torch.clamp(local.clip / (norm + 1e-6), max=1.0))  # as clip_grad_norm_
        self.steps += 1
        if local.optimizer == "sgd":
            self._sgd(params, grad, learning_rate)
        else:
            self._adamw(params, grad, learning_rate)

    def _adamw(self, params: Tensor, grad: Tensor, learning_rate: float) -> None:
        """Loshchilov & Hutter 2019; bias corrections in float64, as torch's."""
        local = self._local
        self._moments = self._moments or (torch.zeros_like(params), torch.zeros_like(params))
        m, v = self._moments
        if local.weight_decay:
            params.mul_(1 - learning_rate * local.weight_decay)
        m.lerp_(grad, 1 - local.beta1)
        v.mul_(local.beta2).addcmul_(grad, grad, value=1 - local.beta2)
        corrected = 1 - local.beta1**self.steps
        scale = math.sqrt(1 - local.beta2**self.steps)
        params.addcdiv_(m, v.sqrt().div_(scale).add_(local.eps), value=-learning_rate / corrected)

    def _sgd(self, params: Tensor, grad: Tensor, learning_rate: float) -> None:
        local = self._local
        if local.weight_decay:
            grad.add_(params, alpha=local.weight_decay)
        if local.momentum:
            if self._moments:
                self._moments[0].mul_(local.momentum).add_(grad)
            else:
                self._moments = (grad.clone(),)
            grad = self._moments[0]
        params.add_(grad, alpha=-learning_rate)
