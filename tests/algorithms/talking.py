"""A toy engine that also generates and scores, and synthesizers that ask it: who asks what of whom."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.client import Client, Tools
from fedloom.data.example import Example
from fedloom.federation import Federation
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, Score, Scored, Steps
from fedloom.synthesis.candidates import Candidate, Synthesis
from fedloom.transport.in_process import Simulation
from tests.fakes import ToyEngine, everybody, numbers, run_alone, say, state, value

ALONE = 50.0  # nats a token of every response alone


def contrast(example: Any) -> tuple[Any, Any]:
    return ("given", example), ("alone", example)


@dataclass
class Talking:
    """A ToyEngine whose answer to a prompt is one token: where the generating adapter is, in tenths.

    Of a response after its instruction, the loss is (w - x)^2 / 2 for each of four tokens, and so is its
    energy; the scorer likes best what it is closest to. `asked` holds all requests in order.
    """

    toy: ToyEngine = field(default_factory=ToyEngine)
    workers: int = 1
    asked: list[tuple[Hashable, Any]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked += requests.items()
        return {key: self._one(key, r) for key, r in requests.items()}

    def initial_adapter(self, seed: int) -> AdapterState:
        return self.toy.initial_adapter(seed)

    def of(self, kind: type, client: Hashable = "only") -> list[Any]:
        return [r for key, r in self.asked if key == client and isinstance(r, kind)]

    def _one(self, key: Hashable, request: Any) -> Any:
        if isinstance(request, Generate):
            return [[round(10 * numbers(request.adapter or state(0.0))[0])] for _ in request.prompts]
        if isinstance(request, Score):
            assert request.adapter is not None
            w = numbers(request.adapter)[0]
            scored = [self._scored(e, w) for e in request.examples]
            return [replace(s, energy=s.nll / 4) for s in scored] if request.energy else scored
        return self.toy.answer({key: request})[key]

    def _scored(self, example: Any, w: float) -> Scored:
        how, example = example if isinstance(example, tuple) else ("given", example)
        return Scored(4 * (ALONE if how == "alone" else (w - value(example)) ** 2 / 2), 4)


@dataclass(frozen=True)
class Equipped:
    """An algorithm, and the tools that its clients have."""

    algorithm: Algorithm
    tools: Tools


def equipped(algorithm: Algorithm, **tools: Any) -> Equipped:
    return Equipped(algorithm, Tools(**{"contrast": contrast, **tools}))


def _apart(given: Algorithm | Equipped) -> tuple[Algorithm, Tools]:
    return (given.algorithm, given.tools) if isinstance(given, Equipped) else (given, Tools())


@dataclass(frozen=True)
class Making:
    """A synthesizer that asks as often as the client's name is long, then makes `examples` and fails once."""

    examples: Sequence[Any]

    def __call__(
        self, local: Sequence[Any], adapter: AdapterState, words: Any, *, seed: int, stream: tuple[Any, ...]
    ) -> Steps[Synthesis]:
        for _ in str(stream[0]):
            yield Generate([[1]], adapter, max_new_tokens=2, stream=stream)
        return Synthesis((Candidate(Example("", ""), "failed/empty"), *map(Candidate, self.examples)))


@dataclass(frozen=True)
class Echoing:
    """A synthesizer whose examples all say what the generator said: they depend on the generator."""

    count: int = 1

    def __call__(
        self, local: Sequence[Any], adapter: AdapterState, words: Any, *, seed: int, stream: tuple[Any, ...]
    ) -> Steps[Synthesis]:
        [[tenths]] = yield Generate([[1]], adapter, stream=stream)
        return Synthesis(tuple(Candidate(say(tenths / 10)) for _ in range(self.count)))


def one_round(
    given: Algorithm | Equipped,
    examples: Sequence[float],
    *,
    start: float = 0.0,
    memory: dict[str, Any] | None = None,
    round: int = 0,
) -> tuple[Update, Talking, Client]:
    """What client "a" answers to a broadcast of `start`, the engine that served it, and the client."""
    algorithm, tools = _apart(given)
    client = Client("a", [say(x) for x in examples], {} if memory is None else memory, tools=tools)
    engine = Talking()
    message = Broadcast(round, {"adapter": state(start, start)})
    return run_alone(algorithm.client(message, client), engine), engine, client


def federate(
    given: Algorithm | Equipped, clients: Mapping[str, Sequence[float]], *, rounds: int = 2, width: int = 8
) -> tuple[ServerState, dict[str, Client]]:
    engine, (algorithm, tools) = Talking(), _apart(given)
    made = {c: Client(c, [say(x) for x in xs], tools=tools) for c, xs in clients.items()}
    transport = Simulation(algorithm, engine, made, clients_per_batch=width)
    state_ = algorithm.init(engine.initial_adapter(0))
    return Federation(algorithm, transport, everybody(made)).run(state_, rounds), made


def fits(engine: Talking) -> list[Fit]:
    return engine.of(Fit)


def is_json(value: Any) -> bool:
    match value:
        case dict():
            return all(isinstance(k, str) and is_json(v) for k, v in value.items())
        case list():
            return all(map(is_json, value))
        case float():
            return math.isfinite(value)
        case _:
            return value is None or isinstance(value, str | int | bool)
