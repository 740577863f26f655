"""Rounds of federated tuning by fedloom's engine, over the very batches that somebody else has taken.

A peer runs first, and what it consumed is recorded: whose examples, in which order. The engine gets each
client's examples arranged so that its own order of them is the recorded one, and so does the same optimizer
steps on the same batches. Examples arrive as text: turning them into tokens is part of a round.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.contest import Stopwatch
from benchmarks.workload import Encode, Example, Work
from fedloom.engine.fitting import batches
from fedloom.engine.lora_engine import LoraEngine
from fedloom.state import AdapterState
from fedloom.steps import Fit, LocalTraining, LoraSpec

Ids = tuple[int, ...]
LEARNING_RATE = 3e-4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, on what, and how; one row of a peer's configuration."""

    size: str  # of the model
    clients: int
    samples: int  # of a client, about
    per_round: int  # clients
    rounds: int = 1
    batch: int  # examples of an optimizer step
    micro_batch: int  # how many a padding trainer runs at once
    targets: tuple[str, ...]
    response_only: bool = False
    group_by_length: bool = False
    checkpointing: bool = False
    tokens_per_pass: int = 4096  # of fedloom's engine
    steps: int | None = None  # optimizer steps of a client; None: one epoch

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(rank=8, alpha=16.0, targets=self.targets)

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(batch_size=self.batch, learning_rate=LEARNING_RATE)


@dataclass
class Outcome:
    """What a contestant made of its rounds."""

    adapter: AdapterState  # after the last round
    watch: Stopwatch
    consumed: list[list[list[Ids]]] = field(
        default_factory=list
    )  # by round, by client: examples in their order
    shares: list[list[float]] = field(
        default_factory=list
    )  # by round: the weight of each client in the average
    work: Work = Work(0, 0, 0)


class Recorder:
    """A collator that notes what goes by.

    A first token is not counted for the loss: left padding would have it predicted from padding, while
    nothing precedes it.
    """

    def __init__(self, inner: Any, consumed: list[Ids]):
        self.inner = inner
        self.consumed = consumed
        self.work = Work(0, 0, 0)

    def __call__(self, features: Sequence[Mapping[str, Any]], *args: Any, **options: Any) -> Any:
        self.consumed.extend(tuple(feature["input_ids"]) for feature in features)
        batch = self.inner(features, *args, **options)
        mask = batch["attention_mask"]
        first = mask.argmax(-1)
        batch["labels"][torch.arange(len(first)), first] = -100
        self.work += Work(int(mask.sum()), int((batch["labels"] != -100).sum()), mask.numel())
        return batch


def arranged(
    examples: Sequence[Example], local: LocalTraining, stream: tuple[str | int, ...]
) -> list[Example]:
    """`examples` in an order in which the engine's own shuffling brings them back."""
    blank = Fit(AdapterState({}), examples, local, stream=stream)
    places = [index for batch in batches(blank) for index, _ in batch]
    out = list(examples)
    for example, place in zip(examples, places, strict=True):
        out[place] = example
    return out


def engine(model: Any, setting: Setting, encode: Encode) -> LoraEngine:
    return LoraEngine.build(
        model,
        encode,
        lora=setting.lora,
        path="fast",
        tokens_per_pass=setting.tokens_per_pass,
    )


def by_fedloom(
    model: Any,
    setting: Setting,
    encode: Encode,
    start: AdapterState,
    peer: Outcome,
    data: Sequence[Sequence[Example]],
) -> Outcome:
    """The peer's rounds again. The model is the engine's from here on."""
    known = {encode(example).ids: example for examples in data for example in examples}
    rounds = []
    for number, consumed in enumerate(peer.consumed):
        chosen = [
            [replace(known[ids]) for ids in mine] for mine in consumed
        ]  # new objects: no tokens are kept
        rounds.append([arranged(e, setting.local, (client, number)) for client, e in enumerate(chosen)])
    machine = engine(model, setting, encode)
    outcome = Outcome(start.to(torch.promote_types(model.dtype, torch.float32)), Stopwatch())
    with outcome.watch.running():
        for number, cohort in enumerate(rounds):
            fits: dict[Hashable, Any] = {
                c: Fit(outcome.adapter, e, setting.local, stream=(c, number)) for c, e in enumerate(cohort)
            }
            fitted = machine.answer(fits)
            shares = peer.shares[number]
            outcome.adapter = weighted([fitted[c].adapter for c in fits], shares)
    tokens = sum(len(ids) for consumed in peer.consumed for mine in consumed for ids in mine)
    outcome.work = Work(tokens, peer.work.labelled, tokens)
    return outcome


def weighted(adapters: Sequence[AdapterState], shares: Sequence[float]) -> AdapterState:
    total = adapters[0] * shares[0]
    for adapter, share in zip(adapters[1:], shares[1:], strict=True):
        total = total + adapter * share
    return total
