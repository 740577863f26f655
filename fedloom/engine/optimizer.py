"""AdamW and SGD, row by row: each training job has its own step count, rate and clip.

The arithmetic is torch's, operation by operation, and a row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedloom.errors import ConfigError


@dataclass(frozen=True)
class LocalTraining:
    """The defaults of every Fit. `batch_size` is the effective batch, whatever fits into one pass."""

    epochs: int = 1
    batch_size: int = 16
    batches: Literal["within_epochs", "across_epochs"] = "within_epochs"  # does an epoch end with a short batch
    learning_rate: float = 3e-4
    schedule: Literal["constant", "cosine"] = "constant"  # across rounds; it never restarts
    rounds: int = 1  # the length of the cosine
    min_learning_rate: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0  # SGD only
    clip: float = 1.0  # L2 norm of a job's whole gradient, correction included; 0: no clipping

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.rounds < 1:
            raise ConfigError(
                "Expected epochs, batch_size and rounds of at least 1, "
                f"got {self.epochs}, {self.batch_size} and {self.rounds}."
            )
        if self.batches not in ("within_epochs", "across_epochs"):
            raise ConfigError(f'Expected batches "within_epochs" or "across_epochs", got {self.batches!r}.')
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f'Expected schedule "constant" or "cosine", got {self.schedule!r}.')
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f'Expected optimizer "adamw" or "sgd", got {self.optimizer!r}.')
        for name in ("learning_rate", "min_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1e30:  # float32 holds it after bias correction
                raise ConfigError(f"Expected {name} between 0 and 1e30, got {getattr(self, name)}.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} in [0, 1), got {getattr(self, name)}.")
        if not self.eps > 0:
            raise ConfigError(f"Expected eps above 0, got {self.eps}.")
        if not self.clip >= 0:
            raise ConfigError(f"Expected clip of at least 0 (0: no clipping), got {self.clip}.")

    def steps_of(self, n: int, count: int) -> int:
        """Optimizer steps on the first `count` examples of a job that has `n` of its own."""
        if self.batches == "across_epochs" or not n:
            return math.ceil(count / self.batch_size)
        epochs, rest = divmod(count, n)
        return epochs * math.ceil(n / self.batch_size) + math.ceil(rest / self.batch_size)

    def learning_rate_at(self, round: int) -> float:
        """Cosine from `learning_rate` at round 0 towards `min_learning_rate` at round `rounds`."""
        if self.schedule == "constant":
            return self.learning_rate
        fraction = min(max(round / self.rounds, 0.0), 1.0)
        span = self.learning_rate - self.min_learning_rate
        return self.min_learning_rate + span * (1 + math.cos(math.pi * fraction)) / 2


class RowOptimizer:
    """The state of one row; fresh for every Fit. Adam's moments, or SGD's momentum."""

    def __init__(self, local: LocalTraining):
        self._local = local
        self._moments: tuple[Tensor, ...] = ()
        self.steps = 0

    def step(self, params: Tensor, grad: Tensor, *, learning_rate: float) -> None:
        """Update `params` (P,) in place. `grad` (P,) is clipped in place first."""
        local = self._local
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
