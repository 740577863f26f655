"""One data owner: its examples, the tools of its site, and a memory that it keeps between rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

from fedloom.errors import ConfigError
from fedloom.messages import ClientId
from fedloom.rng import Name
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, LocalTraining, Steps, Tokens


class Words(Protocol):
    """Text and tokens, as a site's base model reads and writes them."""

    @property
    def stop(self) -> frozenset[int]: ...  # tokens that end a text
    @property
    def positions(self) -> int: ...  # the model's context length, in tokens
    def document_ids(self, text: str) -> list[int]: ...  # plain text to continue, without a prompt format
    def text(self, ids: Sequence[int]) -> str: ...  # exactly as written, spaces and newlines included
    def prompt_ids(self, example: Any, *, room: int = 0) -> list[int]: ...  # `room`: tokens for the answer
    def decode(self, ids: Sequence[int]) -> str: ...  # an answer's text, up to its end


class Synthesis(Protocol):
    """The examples a site has generated, and what became of every other candidate."""

    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def counts(self) -> Mapping[str, int]: ...
    def samples(self) -> Mapping[str, Any]: ...


class Synthesizer(Protocol):
    def __call__(
        self,
        examples: Sequence[Any],
        adapter: AdapterState | None,
        words: Any,
        *,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[Synthesis]:
        """New examples like a client's own, written by the model with this adapter.

        The result depends on the arguments alone: not on other clients, the batch width, or resuming a run.
        """
        ...


# example -> (its response after its instruction, the same response alone), as an engine scores them
Contrast = Callable[[Any], tuple[Tokens, Tokens]]


def _missing(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "This client's site lacks a tool that the algorithm needs. Give its `Client` the `Tools` named in `needs`."
    )


@dataclass(frozen=True)
class Tools:
    """A site's own means for everything that an algorithm does with text. None of them is ever sent."""

    words: Words | None = None
    synthesize: Synthesizer = _missing
    contrast: Contrast = _missing
    relabel: Synthesizer = _missing  # a client's own instructions, answered by the received model


@dataclass
class Client:
    """`memory` is never sent. It holds AdapterStates and plain JSON values, so that it can be saved."""

    id: ClientId
    examples: Sequence[Any]
    memory: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None  # examples a round; None: `local.epochs` times its examples
    local: LocalTraining = LocalTraining()  # with its schedule across rounds
    seed: int = 0  # of the run
    tools: Tools = Tools()

    def fit(
        self,
        adapter: AdapterState,
        *,
        round: int,
        examples: Sequence[Any] | None = None,
        purpose: str = "local",
        **options: Any,
    ) -> Steps[Fitted]:
        """Train on this client's examples, continuing in their order where its last round stopped.

        `purpose` names the stream: two jobs of one client (FedPIT) each keep their own order.
        """
        place = f"seen/{purpose}"
        seen = int(self.memory.get(place, 0))
        fitted: Fitted = yield Fit(
            adapter,
            self.examples if examples is None else examples,
            local=self.local.at(round),
            seed=self.seed,
            stream=(self.id, purpose),
            seen=seen,
            limit=self.limit,
            **options,
        )
        self.memory[place] = seen + fitted.examples
        return fitted

    def staged(self) -> Client:
        """A copy whose memory can be thrown away if the round is not committed."""
        return replace(self, memory=dict(self.memory))
