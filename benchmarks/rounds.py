"""Rounds of federated tuning by fedloom's engine, over exactly the batches that a peer has used.

The peer runs first, and its consumption is recorded: whose examples, in which order. Each client's examples
are arranged so that the engine's own order is the recorded one; so it takes the same optimizer steps on the
same batches. Examples arrive as text: turning them into tokens is part of a round.
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
    """One row of a peer's configuration: what is trained, on which data, and how."""

    size: str  # of the model
    clients: int
    samples: int  # per client, approximately
    per_round: int  # clients
    rounds: int = 1
    batch: int  # examples of an optimizer step
    micro_batch: int  # how many a trainer with padding runs at once
    targets: tuple[str, ...]
    response_only: bool = False
    group_by_length: bool = False
    checkpointing: bool = False
    tokens_per_pass: int = 4096  # of fedloom's engine
    steps: int | None = None  # optimizer steps per client; None: one epoch

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(rank=8, alpha=16.0, targets=self.targets)

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(batch_size=self.batch, learning_rate=LEARNING_RATE)


@dataclass
class Outcome:
    """A contestant's results over its rounds."""

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
    """A collator that records the batches.

    First tokens do not count towards the loss: nothing precedes one, but with left padding it would be
    predicted from padding.
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
    """`examples` in an order that the engine's own shuffling turns back into this one."""
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
    """The peer's rounds again. From here on the model belongs to the engine."""
    known = {encode(example).ids: example for examples in data for example in examples}
    rounds = []
    for number, consumed in enumerate(peer.consumed):
        chosen = [
            [replace(known[ids]) for ids in mine] for mine in consumed
        ]  # new objects, so no tokens are cached
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
