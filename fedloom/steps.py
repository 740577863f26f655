"""What a client may ask of a machine, and the loop that answers many clients in one batch.

The client half of every algorithm is a generator: it yields a request, receives the answer, and
returns an `Update`. On a real network one client runs it alone; in simulation `drive` advances many
of them in lock-step and hands all their requests to the engine at once. Same file, same lines.
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
    targets: tuple[str, ...] | str = "all-linear"  # last components or dotted ends of module names
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
    """How a client trains in a round. `batch_size` is the effective batch, however much fits into one pass."""

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

    def at(self, round: int) -> LocalTraining:
        """The same with that round's learning rate, constant.

        A cosine goes from `learning_rate` at round 0 to `min_learning_rate` at round `rounds`, and stays there.
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
    """Low-rank factors under an adapter, part of the base as far as the adapter can tell: scale * B A.

    Of any rank, for any of the adapted modules, never trained and never subject to dropout. `lora.stack` makes
    one of many.
    """

    factors: AdapterState
    scale: float = 1.0


@dataclass(frozen=True)
class NextToken:
    """Minimise nats of the labelled tokens: each example times its weight, over the batch's labelled tokens."""


Objective = NextToken  # what a Fit may minimise; a preference objective becomes another member


@dataclass(frozen=True)
class Privacy:
    """Record-level differential privacy (DP-SGD): each example's gradient clipped, noise on their sum.

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

    The order of examples is an endless sequence of permutations that belongs to (`seed`, `stream`); this job
    starts `seen` examples into it, so a client goes on where its last round stopped.

    `adapter` may have a lower rank than the engine's; what is trained has the rank it came with.
    """

    adapter: AdapterState
    examples: Sequence[Any]  # Tokens, or whatever the engine's `encode` turns into them
    local: LocalTraining  # its learning rate is this round's: see LocalTraining.at
    seed: int = 0  # of the run
    stream: tuple[Name, ...] = ()  # names this job's randomness: (client id, purpose)
    seen: int = 0  # examples of the stream consumed in earlier rounds
    correction: Correction = Correction()
    limit: int | None = None  # examples this round; None: `local.epochs` times len(examples)
    weights: Sequence[float] | None = None  # one an example, times its loss; a batch's denominator stays
    train: Factors = "AB"  # the others stay as they are, to the bit
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
    """Continue each prompt; the answer is a list of token id lists, without prompt and stop token."""

    prompts: Sequence[Sequence[int]]
    adapter: AdapterState | None = None  # None: the untuned base model
    max_new_tokens: int = 64
    stop: frozenset[int] = frozenset()  # any of these ends an answer
    temperature: float = 0.0  # 0: greedy
    stream: tuple[Name, ...] = ()  # names the randomness of sampling; unused when greedy
    repetition_penalty: float = 1.0  # above 1: tokens that an answer already holds become less likely in it
    top_k: int | None = None  # sampling draws among this many likeliest tokens; None: among all
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
    energy: float | None = (
        None  # -logsumexp of the logits, mean over the labelled tokens; None: not asked for
    )
    tokens: TokenScores | None = None  # None: not asked for


Request = Fit | Generate | Score


class Engine(Protocol):
    @property
    def workers(self) -> int:
        """How many calls of `answer` it works on at a time; more than one may then be made from as many threads."""
        ...

    def answer(self, requests: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Answer one request per key. May batch them; must not let them interact."""
        ...


def drive_groups(groups: Iterable[Mapping[str, Steps[T]]], engine: Engine) -> Iterator[tuple[str, T]]:
    """Drive one group of clients after the other, as many at a time as the engine has workers.

    Groups decide which requests the engine answers together, and results come in the order of the groups: nothing
    depends on the number of workers.
    """
    if engine.workers == 1:
        for group in groups:
            yield from drive(group, engine)
        return
    threads = ThreadPoolExecutor(engine.workers)
    begun: deque[Future[list[tuple[str, T]]]] = deque()
    try:
        for group in groups:
            begun.append(threads.submit(_driven, group, engine))
            if len(begun) > AHEAD * engine.workers:
                yield from begun.popleft().result()
        while begun:
            yield from begun.popleft().result()
    finally:  # not waited for: whoever is interrupted closes the engine next, which ends the batches under way
        threads.shutdown(wait=False, cancel_futures=True)


def _driven(group: Mapping[str, Steps[T]], engine: Engine) -> list[tuple[str, T]]:
    return list(drive(group, engine))


def drive(clients: Mapping[str, Steps[T]], engine: Engine) -> Iterator[tuple[str, T]]:
    """Advance every client to its next request, answer them together, repeat; yield (client, what it returns).

    An error in a client's steps goes up as it is, with a note that names the client.
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
