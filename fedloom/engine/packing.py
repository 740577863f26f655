"""Examples of many jobs -> packed batches without padding between them, within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.engine.attention import Blocks
from fedloom.engine.bank import AdapterBank, RowGroup
from fedloom.engine.dropout import Dropout
from fedloom.engine.prefixes import shared_prefixes
from fedloom.errors import DataError
from fedloom.steps import Tokens

DENSE_COLUMNS = 128  # up to here one masked GEMM over all rows beats a loop over rows


@dataclass(frozen=True)
class Encoded:
    """An example ready to pack. Tokens after its last labelled one are cut: they cannot change the loss."""

    ids: Tensor  # (n,) int64, the tokens that run through the model
    at: Tensor  # (m,) int64, positions in `ids` whose next token is labelled
    targets: Tensor  # (m,) int64, those next tokens

    @classmethod
    def of(cls, tokens: Tokens) -> Encoded:
        ids = torch.tensor(tokens.ids, dtype=torch.long)
        at = torch.tensor(tokens.labelled, dtype=torch.bool).nonzero()[:, 0] - 1
        return cls(ids[: int(at[-1]) + 1 if len(at) else 0], at, ids[at + 1])


class Encoder:
    """Encodes each example once and keeps the result; the least recently used are dropped.

    `Tokens` are taken as they are, and not kept.
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
    dropout: Dropout | None = None
    under: Pass | None = None  # of the frozen factors; has neither gradients nor dropout

    @classmethod
    def of(
        cls, group: RowGroup, owner: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Pass:
        select = None
        if group.width <= DENSE_COLUMNS:
            rows = torch.arange(len(group.rows), device=owner.device)
            select = (owner[:, None] == rows).to(dtype).repeat_interleave(group.rank, dim=1)  # (T, k*r)
        under = None
        if (frozen := group.bank.under) is not None:
            index = frozen.index[[*group.rows, -1]]  # of each row of the group; the last serves the base
            under = cls.of(frozen.group, index[owner], dtype=dtype)
        return cls(group, owner, select, dropout, under)


@dataclass(frozen=True)
class Packed:
    """Several examples end to end, with a beginning that examples of a row share laid down once.

    Tokens and labels are padded at the end, so that few distinct sizes occur. A shared token with the same target in
    several examples is one label, whose weight is their sum.
    """

    ids: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, counted from the start of each example
    lengths: tuple[int, ...]  # of the spans, in order; T - sum(lengths) tokens are padding
    prefixes: tuple[
        tuple[int, int], ...
    ]  # for each span, start and length of the one it continues; length 0: none
    lora: Pass
    label_at: Tensor  # (M,) int64, positions in T
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) at least float32, 0 for padding
    label_of: (
        Tensor  # (L,) int64 on the CPU, for each labelled token of the items, in order: where it is in M
    )
    label_item: Tensor  # (L,) int64 on the CPU, which item of the batch it belongs to

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.lengths, self.prefixes)


def pack(
    items: Sequence[tuple[int, Item]],
    bank: AdapterBank,
    *,
    multiple: int,
    dtype: torch.dtype,
    dropout: tuple[float, int] | None = None,
) -> Packed:
    """Lay numbered items end to end; `dropout` is (rate, seed), used where items carry keys.

    Under dropout nothing is shared, since each example has its own masks.
    """
    device = bank.params.device
    rows = sorted({item.row for _, item in items if item.row >= 0})
    group = RowGroup(bank, rows)
    place = {row: index for index, row in enumerate(rows)} | {-1: -1}
    laid = _Laid()
    for row in [*rows, -1]:
        if mine := [i for i, (_, item) in enumerate(items) if item.row == row]:
            laid.add(mine, [items[i][1] for i in mine], place[row])
    padding = -sum(laid.lengths) % multiple

    def joined(parts: list[Tensor], fill: int = 0) -> Tensor:
        return torch.cat([*parts, torch.full((padding,), fill, dtype=torch.long)])

    examples = [item.example for _, item in items]
    counts = torch.tensor([len(example.at) for example in examples])
    at = torch.cat([laid.where(i, example.at) for i, example in enumerate(examples)])
    targets = torch.cat([example.targets for example in examples])
    distinct, label_of = (at << 32 | targets).unique(return_inverse=True)  # at most (L,); (L,)
    distinct = torch.nn.functional.pad(distinct, (0, -len(distinct) % multiple))  # (M,)
    weights = torch.zeros(len(distinct), dtype=torch.float64)
    each = torch.tensor([item.weight for _, item in items], dtype=torch.float64).repeat_interleave(counts)
    keys = [item.keys for _, item in items if item.keys is not None]
    return Packed(
        ids=joined(laid.ids)[None].to(device),
        positions=joined(laid.positions)[None].to(device),
        lengths=tuple(laid.lengths),
        prefixes=tuple(laid.prefixes),
        lora=Pass.of(
            group,
            joined(laid.owners, -1).to(device),
            dtype=dtype,
            dropout=Dropout(*dropout, joined(laid.keys).to(device)) if dropout and keys else None,
        ),
        label_at=(distinct >> 32).to(device),
        targets=(distinct & 0xFFFFFFFF).to(device),
        weights=weights.index_add_(0, label_of, each).to(device, torch.promote_types(dtype, torch.float32)),
        label_of=label_of,
        label_item=torch.tensor([number for number, _ in items]).repeat_interleave(counts),
    )


class _Laid:
    """The spans of a packed row as they are laid down."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.lengths: list[int] = []
        self.prefixes: list[tuple[int, int]] = []
        self._total = 0
        self._starts: dict[
            int, tuple[int, int, int]
        ] = {}  # item -> start and length of its prefix, start of its own

    def add(self, numbers: Sequence[int], items: Sequence[Item], owner: int) -> None:
        """Items of one row."""
        together = [(0, [i]) for i in range(len(items))]
        if all(item.keys is None for item in items):
            together = shared_prefixes([item.example.ids.tolist() for item in items])
        for p, members in together:
            first = self._total
            if p:
                self._span(items[members[0]], slice(0, p), owner, (0, 0))
            for i in members:
                self._starts[numbers[i]] = (first, p, self._total)
                self._span(items[i], slice(p, None), owner, (first, p) if p else (0, 0))

    def where(self, number: int, at: Tensor) -> Tensor:
        """Positions in an item -> positions in the packed row."""
        prefix, p, own = self._starts[number]
        return torch.where(at < p, at + prefix, at - p + own)

    def _span(self, item: Item, part: slice, owner: int, prefix: tuple[int, int]) -> None:
        ids = item.example.ids[part]
        self.ids.append(ids)
        self.positions.append(torch.arange(len(ids)) + part.start)
        self.owners.append(torch.full((len(ids),), owner))
        if item.keys is not None:
            self.keys.append(item.keys[part])
        self.lengths.append(len(ids))
        self.prefixes.append(prefix)
        self._total += len(ids)


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
