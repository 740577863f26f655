from __future__ import annotations

import pytest
import torch

from fedloom.engine.optimizer import RowOptimizer
from fedloom.errors import ConfigError
from fedloom.steps import LocalTraining


def both(local: LocalTraining, steps: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """The same gradients through our row and through torch's optimizer and clip."""
    stream = torch.Generator().manual_seed(0)
    ours = torch.randn(50, generator=stream)
    theirs = torch.nn.Parameter(ours.clone())
    row = RowOptimizer(local)
    if local.optimizer == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(
            [theirs], lr=local.learning_rate, momentum=local.momentum, weight_decay=local.weight_decay
        )
    else:
        reference = torch.optim.AdamW(
            [theirs],
            lr=local.learning_rate,
            betas=(local.beta1, local.beta2),
            eps=local.eps,
            weight_decay=local.weight_decay,
        )
    for _ in range(steps):
        grad = torch.randn(50, generator=stream)
        theirs.grad = grad.clone()
        if local.clip:
            torch.nn.utils.clip_grad_norm_([theirs], local.clip)
        reference.step()
        row.step(ours, grad)
    return ours, theirs.detach()


@pytest.mark.parametrize(
    "local",
    [
        LocalTraining(learning_rate=0.01),
        LocalTraining(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, clip=0.0),
        LocalTraining(learning_rate=0.01, clip=100.0),
        LocalTraining(optimizer="sgd", learning_rate=0.1),
        LocalTraining(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, clip=0.0),
    ],
)
def test_a_row_moves_as_under_torchs_own_optimizer(local):
    ours, theirs = both(local)
    assert torch.equal(ours, theirs)


def test_constant_rate_is_the_same_in_every_round():
    local = LocalTraining(learning_rate=0.1)
    assert local.at(0).learning_rate == local.at(1000).learning_rate == 0.1


def test_cosine_runs_across_rounds_and_stays_at_its_end():
    local = LocalTraining(learning_rate=1.0, schedule="cosine", rounds=10, min_learning_rate=0.2)
    assert local.at(0).learning_rate == 1.0
    assert local.at(5).learning_rate == pytest.approx(0.6)  # 0.2 + (1 - 0.2) * (1 + cos(pi/2)) / 2
    assert local.at(10).learning_rate == local.at(99).learning_rate == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"schedule": "linear"},
        {"batches": "endless"},
        {"optimizer": "adam"},
        {"clip": -1.0},
        {"learning_rate": 1e38},
        {"learning_rate": -1.0},
        {"beta2": 1.0},
        {"eps": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="Expected"):
        LocalTraining(**wrong)
