"""Stand-ins for a base model: engines whose arithmetic fits on a napkin, and experiments that use them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedloom import rng
from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.data.example import Example
from fedloom.data.partition import partition_table
from fedloom.engine.loading import Facts
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine, Skeleton, load_skeleton
from fedloom.experiment.settings import Experiment
from fedloom.experiment.simulation import Simulated, simulated
from fedloom.messages import ClientId, Update
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, Score, Scored, Steps, drive
from fedloom.transport.base import Arrival

A = "base_model.model.q.lora_A.weight"
B = "base_model.model.q.lora_B.weight"


def state(*values: float, dtype: torch.dtype = torch.float32) -> AdapterState:
    """A vector, kept as rank-1 factors so that it can also be saved as a PEFT adapter."""
    x = torch.tensor(values, dtype=dtype)
    return AdapterState({A: x[None, :], B: torch.zeros(2, 1, dtype=dtype)})  # (1, d), (2, 1)


def numbers(adapter: AdapterState) -> list[float]:
    return adapter[A].flatten().tolist()


def everybody(clients: Iterable[str]) -> Callable[[int], list[str]]:
    """Round -> all of them, every time."""
    return lambda round: sorted(clients)


def run_alone(steps: Steps[Any], engine: Any) -> Any:
    [(_, result)] = drive({"only": steps}, engine)
    return result


def arrival(update: Update, client: ClientId | None = None, *, up: int = 10, down: int = 20) -> Arrival:
    """As if it had travelled, from whom it says or from another."""
    return Arrival(update.client if client is None else client, up, down, lambda: update)


FACTS = Facts("0" * 64, "0" * 64, "toy", "", "", end_reachable=True)


@dataclass
class ToyEngine:
    """Pulls every value of lora_A towards each example, a number: w <- w - lr (w - x). Loss: (w - x)^2 / 2.

    Keeps the contract of Fit to the letter: order, place in the stream, limit. `sent` holds what it was asked.
    """

    learning_rate: float = 0.5
    epochs: int = 1
    start: Sequence[float] = (0.0, 0.0)
    poison: Mapping[str, float] = field(default_factory=dict)  # client -> the value it diverges to
    workers: int = 1
    sent: list[dict[Hashable, Any]] = field(default_factory=list)

    def initial_adapter(self, seed: int = 0) -> AdapterState:
        return state(*self.start)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.sent.append(dict(requests))
        return {key: self._fit(r) if isinstance(r, Fit) else self._score(r) for key, r in requests.items()}

    def _fit(self, fit: Fit) -> Fitted:
        n = len(fit.examples)
        count = self.epochs * n if fit.limit is None else fit.limit
        w, losses = fit.adapter[A].clone(), []
        for position in range(fit.seen, fit.seen + count):
            order = rng.numpy_stream(fit.seed, "order", *fit.stream, position // n).permutation(n).tolist()
            x = value(fit.examples[order[position % n]])
            losses.append(float((w - x).square().mean() / 2))
            w = w - self.learning_rate * (w - x)
        if fit.stream and fit.stream[0] in self.poison:
            w = torch.full_like(w, self.poison[str(fit.stream[0])])
        adapter = AdapterState({A: w, B: fit.adapter[B] + 1})
        return Fitted(
            adapter, len(losses), count, count, self.learning_rate, sum(losses) / max(1, len(losses))
        )

    def _score(self, request: Score) -> list[Scored]:
        w = (self.initial_adapter() if request.adapter is None else request.adapter)[A]
        return [Scored(float((w - value(e)).square().mean() / 2), 1) for e in request.examples]


class ToyLayout(list):
    size = 4

    def to_vector(self, adapter: AdapterState) -> torch.Tensor:
        return torch.cat([t.flatten() for t in adapter.values()])


def value(example: Any) -> float:
    return float(example.response) if isinstance(example, Example) else float(example)


def say(number: float, category: str = "low") -> Example:
    return Example(f"Say {number}.", str(number), category=category, id=f"say:{number}")


def dataset(clients: Mapping[str, Iterable[float]], test: Iterable[float] = (1.0, 2.0, 10.0)) -> Dataset:
    """Numbers below 5 are of category "low", the others of "high"."""
    own = {c: [say(x, "low" if x < 5 else "high") for x in xs] for c, xs in clients.items()}
    pool = [e for examples in own.values() for e in examples]
    ends = [sum(len(e) for e in list(own.values())[: i + 1]) for i in range(len(own))]
    parts = {c: list(range(end - len(own[c]), end)) for c, end in zip(own, ends, strict=True)}
    held = [say(x, "low" if x < 5 else "high") for x in test]
    return Dataset(own, held, partition_table(pool, parts, by="category"), "category")


def machine(engine: ToyEngine | None = None) -> Machine:
    return ToyMachine(engine or ToyEngine(), ToyTemplate(), None, ToyLayout(), FACTS)  # type: ignore[arg-type]


class ToyMachine(Machine):
    def initial_adapter(self, seed: int) -> AdapterState:
        return self.engine.initial_adapter()  # type: ignore[attr-defined,no-any-return]


@cache
def skeleton() -> Skeleton:
    """That of the base which `experiment` names, loaded once."""
    return load_skeleton(experiment())


class NoFiles:
    """What is exported beside a toy's weights: it has no tokenizer."""

    def save(self, folder: Path) -> None: ...


class ToyTemplate:
    format = "plain"
    end_text = "</s>"
    stop = frozenset({2})
    positions = 2048

    def contrast(self, example: Example) -> Any:
        raise NotImplementedError

    def sha256(self) -> str:
        return "0" * 64


FOUR = {"a": (1.0, 2.0, 3.0), "b": (4.0, 5.0), "c": (6.0,), "d": (7.0, 8.0, 9.0, 10.0)}


def experiment(**changes: Any) -> Experiment:
    plain = {"name": "toy", "rounds": 3, "evaluation": {"answers": 0}, "model": {"base": "random:llama"}}
    return Experiment.model_validate(plain).with_(**changes)


def training(
    folder: Path, *, engine: ToyEngine | None = None, algorithm: Algorithm | None = None, **changes: Any
) -> Simulated:
    """Four unequal clients over three rounds; two of them take a limited share in each, so that order matters."""
    data, e = dataset(FOUR), experiment(**changes)
    limits = {"a": 2, "d": 3}
    clients = {c: Client(c, examples, limit=limits.get(c)) for c, examples in data.clients.items()}
    return simulated(
        e, data, machine(engine), folder, algorithm or FedAvg(), clients, everybody(clients), e.fingerprint()
    )
