"""Server optimizers (Reddi et al. 2021): the mean client delta is a pseudo-gradient."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.algorithms.base import ServerOptimizer, ServerState
from fedloom.errors import ConfigError
from fedloom.state import AdapterState


@dataclass(frozen=True, kw_only=True)
class SGD:
    """adapter + lr * mean delta; lr = 1 is plain federated averaging."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"Expected algorithm.server_optimizer.lr > 0, got {self.lr}.")

    def __call__(self, state: ServerState, delta: AdapterState) -> ServerState:
        return state.next(state.adapter + self.lr * delta)


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {"sgd": SGD}
