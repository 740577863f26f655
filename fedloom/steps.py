"""What a client may ask of a machine, and the loop that answers many clients in one batch.

The client half of every algorithm is a generator: it yields a request, receives the answer, and
returns an `Update`. On a real network one client runs it alone; in simulation `drive` advances many
of them in lock-step and hands all their requests to the engine at once. The code is the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from fedloom.errors import ConfigError, ModelError
from fedloom.rng import Name
from fedloom.state import AdapterState

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
AHEAD = 2  # groups a worker begun before the first of them is taken: bounds the answers that wait
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
class LoraSpec:
    """The adapter to train, in PEFT's words with PEFT's meaning."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"  # last components or dotted suffixes of module names
    rslora: bool = False  # scale by alpha / sqrt(rank), not alpha / rank (arXiv 2312.03732)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"Expected a LoRA rank of at least 1, got {self.rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelError(f"Expected a LoRA dropout in [0, 1), got {self.dropout}.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round. `batch_size` is the effective batch, even if a pass holds less."""

    epochs: int = 1
    batch_size: int = 16
    # "within_epochs": the last batch of an epoch may be smaller; no batch spans two epochs.
    batches: Literal["within_epochs", "across_epochs"] = "within_epochs"
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
            if not 0 <= getattr(self, name) <= 1e30:  # stays finite in float32 after bias correction
                raise ConfigError(f"Expected {name} between 0 and 1e30, got {getattr(self, name)}.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} in [0, 1), got {getattr(self, name)}.")
        if not self.eps > 0:
            raise ConfigError(f"Expected eps above 0, got {self.eps}.")
        if not self.clip >= 0:
            raise ConfigError(f"Expected clip of at least 0 (0: no clipping), got {self.clip}.")

    def steps_of(self, n: int, count: int) -> int:
        """Optimizer steps for the first `count` examples of a job with `n` distinct ones."""
        if self.batches == "across_epochs" or not n:
            return math.ceil(count / self.batch_size)
        epochs, rest = divmod(count, n)
        return epochs * math.ceil(n / self.batch_size) + math.ceil(rest / self.batch_size)

    def at(self, round: int) -> LocalTraining:
        """These settings with that round's learning rate, held constant.

        A cosine goes from `learning_rate` at round 0 to `min_learning_rate` at round `rounds`, and stays
        there.
        """
        if self.schedule == "constant":
            return self
        fraction = min(max(round / self.rounds, 0.0), 1.0)
        span = self.learning_rate - self.min_learning_rate
        rate = self.min_learning_rate + span * (1 + math.cos(math.pi * fraction)) / 2
        return replace(self, learning_rate=rate, schedule="constant")


@dataclass(frozen=True)
class Correction:
    """Added to every local gradient: offset + mu * (w - anchor). Both have the shapes of the adapter."""

    offset: AdapterState | None = None  # SCAFFOLD, FedDyn
    anchor: AdapterState | None = None  # FedProx, Ditto
    mu: float = 0.0


@dataclass(frozen=True)
class Frozen:
    """Low-rank factors, scale * B A, added to the base model under an adapter.

    They may have any rank and cover any of the adapted modules. They are never trained and see no dropout.
    `lora.stack` joins several into one.
    """

    factors: AdapterState
    scale: float = 1.0


@dataclass(frozen=True)
class NextToken:
    """Minimise nats per labelled token: weighted nats of examples, over the batch's labelled tokens."""


Objective = NextToken  # what a Fit may minimise; a preference objective would be another member


@dataclass(frozen=True)
class Privacy:
    """Record-level differential privacy (DP-SGD): clip each example's gradient, add noise to their sum.

    Source: Abadi et al. 2016, arXiv 1607.00133, Algorithm 1.
    """

    clip: float  # L2 norm of one example's gradient
    noise_multiplier: float  # standard deviation of the noise on the sum, in units of `clip`

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"Expected a clip above 0 and finite, got {self.clip}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"Expected a noise multiplier of at least 0, got {self.noise_multiplier}.")


Factors = Literal["AB", "A", "B"]


@dataclass(frozen=True)
class Fit:
    """Train `adapter` on `examples`; the answer is a `Fitted`.

    (`seed`, `stream`) determine the order of examples, an endless sequence of permutations. This job starts
    `seen` examples into it, so a client continues where its last round stopped.

    `adapter` may have a lower rank than the engine's; the trained one keeps that rank.
    """

    adapter: AdapterState
    examples: Sequence[Any]  # Tokens, or whatever the engine's `encode` turns into them
    local: LocalTraining  # its learning rate is this round's: see LocalTraining.at
    seed: int = 0  # of the run
    stream: tuple[Name, ...] = ()  # names this job's randomness: (client id, purpose)
    seen: int = 0  # examples of the stream consumed in earlier rounds
    correction: Correction = Correction()
    limit: int | None = None  # examples this round; None: `local.epochs` times len(examples)
    weights: Sequence[float] | None = None  # one per example, times its loss; not in a batch's denominator
    train: Factors = "AB"  # which factors to train; the others keep their bits
    frozen: Frozen | None = None
    objective: Objective = NextToken()
    privacy: Privacy | None = None
    scale: float | None = None  # of B A; None: the engine's own, whatever rank the adapter has

    def __post_init__(self) -> None:
        if self.train not in ("AB", "A", "B"):
            raise ConfigError(f'Expected train "AB", "A" or "B", got {self.train!r}.')


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
    """Continue each prompt; the answer is a list of token id lists, without the prompt and stop token."""

    prompts: Sequence[Sequence[int]]
    adapter: AdapterState | None = None  # None: the untuned base model
    max_new_tokens: int = 64
    stop: frozenset[int] = frozenset()  # any of these ends an answer
    temperature: float = 0.0  # 0: greedy
    stream: tuple[Name, ...] = ()  # names the randomness of sampling; unused when greedy
    repetition_penalty: float = 1.0  # above 1: tokens already in an answer become less likely
    top_k: int | None = None  # sample from this many likeliest tokens; None: from all
    seed: int = 0  # of the run; unused when greedy
    frozen: Frozen | None = None
    scale: float | None = None  # as in Fit


@dataclass(frozen=True)
class Score:
    """Loss of each example, without training; the answer is a list of `Scored`."""

    examples: Sequence[Any]  # as in Fit
    adapter: AdapterState | None = None  # None: the untuned base model
    energy: bool = False  # also `Scored.energy`
    per_token: bool = False  # also `Scored.tokens`
    frozen: Frozen | None = None
    scale: float | None = None  # as in Fit


@dataclass(frozen=True)
class TokenScores:
    """The model's log-probability of each labelled token, in order; nats.

    `mean` and `std` are those of log p where the token is drawn from the model's own next-token distribution
    at that place, over the whole vocabulary.
    """

    logp: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    nll: float  # nats, summed over the labelled tokens
    targets: int  # labelled tokens
    energy: float | None = None  # -logsumexp of the logits, mean over labelled tokens; None: not asked for
    tokens: TokenScores | None = None  # None: not asked for
    last: float | None = None  # nats of the last labelled token; None: there is none


Request = Fit | Generate | Score


class Engine(Protocol):
    @property
    def workers(self) -> int:
        """How many calls of `answer` it works on at a time; that many threads may then call it."""
        ...

    def answer(self, requests: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Answer one request per key. May batch them; must not let them interact."""
        ...


def drive_groups(groups: Iterable[Mapping[K, Steps[T]]], engine: Engine) -> Iterator[tuple[K, T]]:
    """Drive groups of clients in turn, as many at a time as the engine has workers.

    Groups decide which requests the engine answers together, and results come in the order of the groups:
    nothing depends on the number of workers.
    """
    if engine.workers == 1:
        for group in groups:
            yield from drive(group, engine)
        return
    threads = ThreadPoolExecutor(engine.workers)
    begun: deque[Future[list[tuple[K, T]]]] = deque()
    try:
        for group in groups:
            begun.append(threads.submit(_driven, group, engine))
            if len(begun) > AHEAD * engine.workers:
                yield from begun.popleft().result()
        while begun:
            yield from begun.popleft().result()
    finally:  # do not wait: an interrupted caller closes the engine next, which ends the batches under way
        threads.shutdown(wait=False, cancel_futures=True)


def _driven(group: Mapping[K, Steps[T]], engine: Engine) -> list[tuple[K, T]]:
    return list(drive(group, engine))


def drive(clients: Mapping[K, Steps[T]], engine: Engine) -> Iterator[tuple[K, T]]:
    """Advance every client to its next request, answer all together, repeat; yield (client, return value).

    An error in a client's steps propagates unchanged, with a note that names the client.
    """
    running = dict(clients)
    answers: Mapping[Hashable, Any] = dict.fromkeys(running)
    while running:
        requests: dict[Hashable, Any] = {}
        for client in list(running):
            try:
                requests[client] = running[client].send(answers[client])
            except StopIteration as finished:
                del running[client]
                yield client, finished.value
            except Exception as error:
                error.add_note(f"while {client} was at work")
                raise
        answers = engine.answer(requests) if requests else {}
