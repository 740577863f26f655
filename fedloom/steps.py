"""What a client may ask of a machine, and the loop that answers many clients in one batch.

The client half of every algorithm is a generator: it yields a request, receives the answer, and
returns an `Update`. On a real network one client runs it alone; in simulation `drive` advances many
of them in lock-step and hands all their requests to the engine at once. Same file, same lines.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fedloom.rng import Name
from fedloom.state import AdapterState

T = TypeVar("T")
Steps = Generator[Any, Any, T]  # yields requests, receives answers, returns T


@dataclass(frozen=True)
class Tokens:
    """One example as a model sees it.

    Token i is predicted from the tokens before it; it counts for the loss where `labelled[i]`. The
    first token is never labelled, since nothing precedes it.
    """

    ids: tuple[int, ...]
    labelled: tuple[bool, ...]  # same length as ids

    @property
    def targets(self) -> int:
        """How many tokens count for the loss."""
        return sum(self.labelled)


@dataclass(frozen=True)
class Correction:
    """Added to every local gradient: offset + mu * (w - anchor)."""

    offset: AdapterState | None = None  # SCAFFOLD, FedDyn
    anchor: AdapterState | None = None  # FedProx, Ditto
    mu: float = 0.0


@dataclass(frozen=True)
class Fit:
    """Train `adapter` on `examples` with the run's local optimizer; the answer is a `Fitted`.

    The order of examples is an endless sequence of permutations that belongs to (run seed, `stream`);
    this job starts `seen` examples into it, so a client goes on where its last round stopped.
    """

    adapter: AdapterState
    examples: Sequence[Any]  # Tokens, or whatever the engine's `encode` turns into them
    round: int = 0  # the learning rate is a function of the round
    stream: tuple[Name, ...] = ()  # names this job's randomness: (client id, purpose)
    seen: int = 0  # examples of the stream consumed in earlier rounds
    correction: Correction = Correction()
    limit: int | None = None  # examples this round; None: `epochs` times len(examples)
    weights: Sequence[float] | None = None  # one an example, times its loss; a batch's denominator stays


@dataclass(frozen=True)
class Fitted:
    adapter: AdapterState
    steps: int  # optimizer steps taken
    examples: int  # examples consumed
    tokens: int  # tokens run forward and backward, without padding
    learning_rate: float
    loss: float  # mean over optimizer steps, nats per labelled token


@dataclass(frozen=True)
class Generate:
    """Continue each prompt; the answer is a list of token id lists, without prompt and stop token."""

    prompts: Sequence[Sequence[int]]
    adapter: AdapterState | None = None  # None: the untuned base model
    max_new_tokens: int = 64
    stop: frozenset[int] = frozenset()  # any of these ends an answer
    temperature: float = 0.0  # 0: greedy
    stream: tuple[Name, ...] = ()  # names the randomness of sampling; unused when greedy
    repetition_penalty: float = 1.0  # above 1: tokens that an answer holds already become less likely in it
    top_k: int | None = None  # sampling draws among so many likeliest tokens; None: among all


@dataclass(frozen=True)
class Score:
    """Loss of each example, without training; the answer is a list of `Scored`."""

    examples: Sequence[Any]  # as in Fit
    adapter: AdapterState | None = None  # None: the untuned base model
    energy: bool = False  # wanted, too
    per_token: bool = False  # wanted, too


@dataclass(frozen=True)
class TokenScores:
    """What the model thought of each labelled token, in order; nats.

    `mean` and `std` are of log p over the whole vocabulary, under the model's own next-token distribution
    at that place: how likely a token drawn from the model would have been.
    """

    logp: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    nll: float  # nats, summed over the labelled tokens
    targets: int  # labelled tokens
    energy: float | None = None  # -logsumexp of the logits, mean over the labelled tokens; None: not asked for
    tokens: TokenScores | None = None  # None: not asked for


Request = Fit | Generate | Score


class Engine(Protocol):
    def answer(self, requests: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Answer one request per key. May batch them; must not let them interact."""
        ...


def generate(prompts: Sequence[Sequence[int]], **options: Any) -> Steps[list[list[int]]]:
    return (yield Generate(prompts, **options))


def score(examples: Sequence[Any], adapter: AdapterState | None) -> Steps[list[Scored]]:
    return (yield Score(examples, adapter))


def drive(clients: Mapping[str, Steps[T]], engine: Engine) -> Iterator[T]:
    """Advance every client to its next request, answer them together, repeat; yield what each returns."""
    running = dict(clients)
    answers: Mapping[Hashable, Any] = dict.fromkeys(running)
    while running:
        requests: dict[Hashable, Any] = {}
        for client in list(running):
            try:
                requests[client] = running[client].send(answers[client])
            except StopIteration as finished:
                del running[client]
                yield finished.value
        answers = engine.answer(requests) if requests else {}
