"""Examples of many jobs -> packed batches without padding between them, within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedloom.engine.bank import AdapterBank, RowGroup
from fedloom.engine.dropout import Dropout
from fedloom.errors import DataError
from fedloom.steps import Tokens

DENSE_COLUMNS = 128  # up to here one masked GEMM over all rows beats a loop over rows


@dataclass(frozen=True)
class Encoded:
    """An example ready to pack. What follows its last labelled token is cut: it cannot move the loss."""

    ids: Tensor  # (n,) int64, the tokens that run through the model
    at: Tensor  # (m,) int64, positions in `ids` whose next token is labelled
    targets: Tensor  # (m,) int64, those next tokens

    @classmethod
    def of(cls, tokens: Tokens) -> Encoded:
        ids = torch.tensor(tokens.ids, dtype=torch.long)
        at = torch.tensor(tokens.labelled, dtype=torch.bool).nonzero()[:, 0] - 1
        return cls(ids[: int(at[-1]) + 1 if len(at) else 0], at, ids[at + 1])


class Encoder:
    """`encode`, once for each example object while it is in use: the ones not asked for longest are forgotten.

    What is `Tokens` already is taken as it is, and not kept.
    """

    KEPT = 65_536  # examples; synthetic ones are new every round, so something must go

    def __init__(self, encode: Callable[[Any], Tokens], *, vocabulary: int, longest: int | None):
        self._encode = encode
        self._vocabulary = vocabulary
        self._longest = longest
        self._known: dict[int, tuple[Any, Encoded]] = {}  # the example is kept, so that its id stays its own

    def __call__(self, example: Any) -> Encoded:
        if isinstance(example, Tokens):
            return self._checked(example)
        known = self._known.pop(id(example), None) or (example, self._checked(self._encode(example)))
        self._known[id(example)] = known  # dictionaries keep their order: the last is the latest
        if len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]
        return known[1]

    def _checked(self, tokens: Tokens) -> Encoded:
        if len(tokens.ids) != len(tokens.labelled):
            raise DataError(
                f"Expected a label flag a token, got {len(tokens.labelled)} for {len(tokens.ids)}."
            )
        if tokens.labelled and tokens.labelled[0]:
            raise DataError("The first token is labelled, but nothing precedes it to predict it from.")
        if tokens.ids and not 0 <= min(tokens.ids) <= max(tokens.ids) < self._vocabulary:
            raise DataError(
                f"Token id {max(tokens.ids)} is outside the model's {self._vocabulary} embeddings: "
                "the tokenizer belongs to another model."
            )
        encoded = Encoded.of(tokens)
        if self._longest is not None and len(encoded.ids) > self._longest:
            raise DataError(
                f"An example has {len(encoded.ids)} tokens, the model reads {self._longest}: cut it shorter."
            )
        return encoded


@dataclass(frozen=True)
class Item:
    """One example in one batch of one job."""

    row: int  # of the bank; -1: the base model alone
    example: Encoded
    weight: float = 0.0  # of each of its labelled tokens in the job's loss
    keys: Tensor | None = None  # (n,) int64, dropout keys of its tokens


@dataclass(frozen=True)
class Pass:
    """What the LoRA layers must know about the tokens that flow through the model now."""

    group: RowGroup
    owner: Tensor  # (T,) int64, index into group.rows; -1: no adapter
    select: Tensor | None  # (T, rows*r) 0/1 in the model's dtype; None when the group is too wide for it
    members: tuple[Tensor, ...]  # without `select`: for each row of the group, its tokens
    dropout: Dropout | None = None

    @classmethod
    def of(
        cls, group: RowGroup, owner: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Pass:
        rank = group.bank.layout.spec.rank
        if group.width <= DENSE_COLUMNS:
            rows = torch.arange(len(group.rows), device=owner.device)
            select = (owner[:, None] == rows).to(dtype).repeat_interleave(rank, dim=1)  # (T, k*r)
            return cls(group, owner, select, (), dropout)
        members = tuple((owner == row).nonzero()[:, 0] for row in range(len(group.rows)))
        return cls(group, owner, None, members, dropout)


@dataclass(frozen=True)
class Packed:
    """Several examples end to end. Tokens and labels are padded at the end to few distinct sizes."""

    ids: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, counted from the start of each example
    lengths: tuple[int, ...]  # of the examples, in order; T - sum(lengths) tokens are padding
    lora: Pass
    label_at: Tensor  # (M,) int64, positions in T
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) at least float32, 0 for padding
    labels: int  # the first `labels` of M are real
    label_item: Tensor  # (labels,) int64 on the CPU, which item of the batch a label belongs to


def pack(
    items: Sequence[tuple[int, Item]],
    bank: AdapterBank,
    *,
    multiple: int,
    dtype: torch.dtype,
    dropout: tuple[float, int] | None = None,
) -> Packed:
    """Lay numbered items end to end; `dropout` is (rate, seed), used where items carry keys."""
    device = bank.params.device
    lengths = tuple(len(item.example.ids) for _, item in items)
    total = sum(lengths)
    padding = -total % multiple
    rows = sorted({item.row for _, item in items if item.row >= 0})
    group = RowGroup(bank, rows)

    def joined(parts: list[Tensor], pad: int, fill: int = 0) -> Tensor:
        return torch.cat([*parts, torch.full((pad,), fill, dtype=torch.long)])

    starts = accumulate(lengths, initial=0)
    label_at = [start + item.example.at for start, (_, item) in zip(starts, items, strict=False)]
    place = {row: index for index, row in enumerate(rows)} | {-1: -1}
    owner = joined([torch.full((len(i.example.ids),), place[i.row]) for _, i in items], padding, -1)
    keys = [item.keys for _, item in items if item.keys is not None]
    counts = torch.tensor([len(item.example.at) for _, item in items])
    labels = int(counts.sum())
    weights = torch.zeros(labels + -labels % multiple, dtype=torch.float64)
    weights[:labels] = torch.tensor([i.weight for _, i in items], dtype=torch.float64).repeat_interleave(
        counts
    )
    return Packed(
        ids=joined([item.example.ids for _, item in items], padding)[None].to(device),
        positions=joined([torch.arange(n) for n in lengths], padding)[None].to(device),
        lengths=lengths,
        lora=Pass.of(
            group,
            owner.to(device),
            dtype=dtype,
            dropout=Dropout(*dropout, joined(keys, padding).to(device)) if dropout and keys else None,
        ),
        label_at=joined(label_at, -labels % multiple).to(device),
        targets=joined([item.example.targets for _, item in items], -labels % multiple).to(device),
        weights=weights.to(device, torch.promote_types(dtype, torch.float32)),
        labels=labels,
        label_item=torch.tensor([number for number, _ in items]).repeat_interleave(counts),
    )


def split(items: Sequence[Item], budget: int, *, isolated: bool = False) -> Iterator[list[tuple[int, Item]]]:
    """Number the items and cut them, in order, into lists of at most `budget` tokens.

    An item longer than the budget gets a list of its own; one without labels is left out. `isolated`
    keeps items of different rows apart.
    """
    batch: list[tuple[int, Item]] = []
    tokens = 0
    for number, item in enumerate(items):
        n = len(item.example.ids)
        if n == 0:
            continue
        if batch and (tokens + n > budget or (isolated and batch[-1][1].row != item.row)):
            yield batch
            batch, tokens = [], 0
        batch.append((number, item))
        tokens += n
    if batch:
        yield batch
