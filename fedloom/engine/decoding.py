"""Prompts read, then continued token by token, with their keys and values kept.

`FastDecoding` reads prompts as the packed model reads examples: without padding, and a shared beginning of one
adapter's prompts only once. Keys and values go into memory allocated once, with rows of similar length in one block;
new ones are appended, and a step attends, block by block, to the filled part.
`PlainDecoding` leaves all of this to the model; it serves models that the packed model cannot run, with any cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from fedloom.engine.forward import PackedModel
from fedloom.engine.head import LabelHead
from fedloom.engine.packing import Encoded, Item, pack, split
from fedloom.engine.serving import Rows, ServedModel
from fedloom.errors import ModelError

NAME = "fedloom_step"  # of the attention of one step
LIKE = 1.25  # rows share a block of memory up to this ratio of what the longest and the shortest need


class Decoding(Protocol):
    """A batch of prompts under way. Nothing is in force between two calls."""

    def read(self) -> Tensor:
        """Logits after each prompt: (B, V)."""
        ...

    def append(self, tokens: Sequence[int]) -> Tensor:
        """Logits after one more token of each row: (B, V)."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, which are in ascending order."""
        ...


def decoding(
    served: ServedModel, rows: Rows, prompts: Sequence[Sequence[int]], owners: Sequence[int], *, new: int
) -> Decoding:
    """For prompts, from short to long, that belong to the adapters `owners` and get at most `new` tokens."""
    if served.packed is not None and not served.decoding_reason:
        return FastDecoding(served.model, served.packed, rows, prompts, owners, new=new)
    return PlainDecoding(served.model, rows, prompts, owners)


class PlainDecoding:
    """The model's own cache, attention and head; prompts are padded on the left."""

    def __init__(self, model: Any, rows: Rows, prompts: Sequence[Sequence[int]], owners: Sequence[int]):
        self._model = model
        self._rows = rows
        width = max(map(len, prompts))
        self._ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])  # (B, L)
        lengths = torch.tensor([len(ids) for ids in prompts])[:, None]
        self._mask = (torch.arange(width) >= width - lengths).long()  # (B, L)
        self._ids, self._mask = self._ids.to(model.device), self._mask.to(model.device)
        self._owners = torch.tensor(owners)[:, None]  # (B, 1)
        self._cache: Any = None
        self._known = inspect.signature(model.forward).parameters

    def read(self) -> Tensor:
        return self._run(self._ids, (self._mask.cumsum(1) - 1).clamp_min(0))

    def append(self, tokens: Sequence[int]) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]  # (B, 1)
        return self._run(ids, self._mask.sum(1, keepdim=True) - 1)

    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask, self._owners = self._mask[chosen], self._owners[rows]
        self._cache.batch_select_indices(chosen)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions} if "position_ids" in self._known else {}
        if "logits_to_keep" in self._known:  # as an index: a slice of one would be expanded by the vocabulary
            options["logits_to_keep"] = torch.tensor([-1], device=ids.device)
        with torch.no_grad(), self._rows.tokens(self._owners.expand(ids.shape)):
            out = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )
        self._cache = out.get("past_key_values")
        if self._cache is None:
            raise _keeps_nothing(self._model)
        return out.logits[:, -1]


class FastDecoding:
    """The packed model's reading, memory taken once, and an attention of its own for steps."""

    def __init__(
        self,
        model: Any,
        packed: PackedModel,
        rows: Rows,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        *,
        new: int,
    ):
        self._model = model
        self._packed = packed
        self._head = LabelHead.of(model)
        self._rows = rows
        self._prompts = prompts
        self._owners = list(owners)
        self._layout = Layout.of([len(ids) for ids in prompts], new - 1)  # nothing follows the last token
        self._cache = Cache(layer_class_to_replicate=partial(_Layer, self._layout))  # type: ignore[arg-type]

    def read(self) -> Tensor:
        askers: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # a prompt that many rows have is read once
        for row, (owner, ids) in enumerate(zip(self._owners, self._prompts, strict=True)):
            askers.setdefault((owner, tuple(ids)), []).append(row)
        distinct = sorted(askers, key=lambda prompt: prompt[0])  # those of an adapter in one pass
        items = [Item(owner, _all_labelled(ids)) for owner, ids in distinct]
        plan, found = self._packed.plan, list[Tensor]()
        with torch.no_grad(), plan.kernels(), self._packed.own_attention():
            for part in split(items, plan.tokens_per_pass):
                packed = pack(part, self._rows.group.bank, multiple=plan.multiple, dtype=self._rows.dtype)
                lengths = [len(item.example.ids) for _, item in part]
                where = packed.label_at.cpu()[packed.label_of].split(lengths)
                self._layout.reading = [
                    (askers[distinct[number]], list(_runs(own)))
                    for (number, _), own in zip(part, where, strict=True)
                ]
                with self._rows.active.using(packed.lora):
                    hidden = self._model.base_model(
                        input_ids=packed.ids,
                        position_ids=packed.positions,
                        past_key_values=self._cache,
                        use_cache=True,
                        blocks=packed.blocks,
                    ).last_hidden_state[0]  # (T, d)
                found.append(self._head.logits(hidden[[int(own[-1]) for own in where]]))
        self._layout.reading = []
        if not self._cache.layers:
            raise _keeps_nothing(self._model)
        logits = torch.cat(found)  # (distinct, V)
        number = {row: i for i, prompt in enumerate(distinct) for row in askers[prompt]}
        return logits[[number[row] for row in range(len(number))]]

    def append(self, tokens: Sequence[int]) -> Tensor:
        device, layout = self._model.device, self._layout
        layout.advance()
        with (
            torch.no_grad(),
            self._rows.tokens(torch.tensor(self._owners)[:, None]),
            _attending(self._model.config),
        ):
            hidden = self._model.base_model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                position_ids=torch.tensor(layout.positions(), device=device)[:, None],
                past_key_values=self._cache,
                use_cache=True,
                layout=layout,
            ).last_hidden_state[:, 0]  # (B, d)
        with torch.no_grad(), self._packed.plan.kernels():
            return self._head.logits(hidden)

    def keep(self, rows: Sequence[int]) -> None:
        self._owners = [self._owners[row] for row in rows]
        before, self._layout = self._layout, self._layout.of_rows(rows)
        for layer in self._cache.layers:
            assert isinstance(layer, _Layer)
            layer.move(before, self._layout, rows)


@dataclass(frozen=True)
class Block:
    """Rows with prompts of similar length, right-aligned to the longest, and their place in memory."""

    rows: slice
    lengths: tuple[int, ...]  # of their prompts
    longest: int
    columns: int
    offset: int  # slots of the blocks before

    def of(self, memory: Tensor) -> Tensor:
        """Its part of a layer's memory (slots, H_kv, D): (b, H_kv, columns, D)."""
        _, heads, size = memory.shape
        slots = len(self.lengths) * self.columns
        return memory[self.offset : self.offset + slots].view(-1, heads, self.columns, size)


@dataclass
class Layout:
    """The slots of a layer's memory that belong to each row, and how many are filled."""

    blocks: list[Block]
    room: int  # columns for tokens after the prompts
    steps: int = 0  # tokens appended to every prompt
    # While prompts are read: the rows that asked each, and (start, end) of its tokens in the packed batch.
    reading: list[tuple[list[int], list[tuple[int, int]]]] = field(default_factory=list)
    # Of this step, by offset and first column.
    _biases: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], room: int) -> Layout:
        """Rows share a block while the longest takes at most `LIKE` times the room of the shortest. Lengths ascend."""
        blocks: list[Block] = []
        first = offset = 0
        for end in range(1, len(lengths) + 1):
            if end < len(lengths) and lengths[end] + room <= LIKE * (lengths[first] + room):
                continue
            mine, longest = tuple(lengths[first:end]), lengths[end - 1]
            blocks.append(Block(slice(first, end), mine, longest, longest + room, offset))
            offset += len(mine) * (longest + room)
            first = end
        return cls(blocks, room)

    def of_rows(self, rows: Sequence[int]) -> Layout:
        lengths = [n for block in self.blocks for n in block.lengths]
        layout = Layout.of([lengths[row] for row in rows], self.room)
        layout.steps = self.steps
        return layout

    def advance(self) -> None:
        self.steps += 1
        self._biases.clear()

    @property
    def slots(self) -> int:
        return self.blocks[-1].offset + len(self.blocks[-1].lengths) * self.blocks[-1].columns

    def memory(self, heads: int, like: Tensor) -> Tensor:
        """For the keys or values of a layer: (slots, heads, D). Masked slots are zero, since they must be finite."""
        memory = like.new_empty(self.slots, heads, like.shape[-1])
        for block in self.blocks:
            for row, n in zip(block.of(memory), block.lengths, strict=True):
                if n < block.longest:
                    row[:, : block.longest - n] = 0
        return memory

    def positions(self) -> list[int]:
        """Of the last token of each row."""
        return [n + self.steps - 1 for block in self.blocks for n in block.lengths]

    def places(self, memory: Tensor) -> list[Tensor]:
        """For each row its filled part of a layer's memory: (H_kv, n, D)."""
        return [
            one[:, block.longest - n : block.longest + self.steps]
            for block in self.blocks
            for one, n in zip(block.of(memory), block.lengths, strict=True)
        ]

    def bias(self, block: Block, begin: int, like: Tensor) -> Tensor | None:
        """(b, 1, columns from `begin` on), -inf before a row begins; None where all have. Made once a step."""
        starts = [block.longest - n for n in block.lengths]
        if begin >= starts[0]:
            return None
        key = block.offset, begin
        if key not in self._biases:
            first = torch.tensor(starts, device=like.device)[:, None, None]
            hidden = torch.arange(begin, block.longest + self.steps, device=like.device) < first
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            self._biases[key] = zero.masked_fill(hidden, -torch.inf)
        return self._biases[key]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer: (slots, H_kv, D) each."""

    is_sliding = False

    def __init__(self, layout: Layout):
        CacheLayerMixin.__init__(self)
        self.layout = layout
        self.memory: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.memory = tuple(self.layout.memory(new.shape[1], new) for new in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return those a query may see: of the batch being read, else all memory."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self.layout
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            if layout.reading:
                places = layout.places(memory)
                for rows, runs in layout.reading:
                    sizes = [end - start for start, end in runs]
                    for row in rows:
                        for part, (start, end) in zip(places[row].split(sizes, 1), runs, strict=True):
                            part.copy_(new[0, :, start:end])
            else:
                for block in layout.blocks:
                    block.of(memory)[:, :, block.longest + layout.steps - 1] = new[block.rows, :, 0]
        if layout.reading:
            return key_states, value_states
        keys, values = self.memory
        return keys, values

    def move(self, before: Layout, after: Layout, rows: Sequence[int]) -> None:
        """Keep these rows only, in less memory."""
        old, self.layout = self.memory, after
        self.memory = tuple(after.memory(memory.shape[1], memory) for memory in old)
        for full, less in zip(old, self.memory, strict=True):
            places = before.places(full)
            for row, place in zip(rows, after.places(less), strict=True):
                place.copy_(places[row])

    def get_seq_length(self) -> int:
        return 0 if self.layout.reading else self.layout.positions()[-1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.layout.blocks[-1].columns


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (B, H, 1, D), key and value a layer's memory (slots, H_kv, D) -> (B, 1, H, D)."""
    if layout is None or attention_mask is not None or key.shape[0] != layout.slots:
        raise ModelError("The model does not hand its arguments down to its attention while it generates.")
    heads, kv_heads = query.shape[1], key.shape[1]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out = query.new_empty(query.shape[0], 1, heads, value.shape[-1])
    for block in layout.blocks:
        end = block.longest + layout.steps
        begin = 0 if sliding_window is None else max(0, end - sliding_window)
        q = query[block.rows].reshape(-1, heads // kv_heads, query.shape[-1])  # (b*H_kv, shared, D)
        k, v = (block.of(memory)[:, :, begin:end].flatten(0, 1) for memory in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(-1, heads, end - begin)  # (b, H, columns)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        bias = layout.bias(block, begin, scores)
        if bias is not None:
            scores += bias
        weights = torch.softmax(scores, -1).view(len(q), -1, end - begin)  # (b*H_kv, shared, columns)
        out[block.rows] = torch.bmm(weights, v).view(-1, 1, heads, v.shape[-1])
    return out, None


AttentionInterface.register(NAME, attend)


@contextmanager
def _attending(config: Any) -> Iterator[None]:
    """The attention of a step inside; outside the model keeps the one it came with."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _all_labelled(ids: Sequence[int]) -> Encoded:
    """A prompt as an example whose tokens are all labelled: a packed batch then records where each one lies."""
    tokens = torch.tensor(ids, dtype=torch.long)
    return Encoded(tokens, torch.arange(len(tokens)), tokens)


def _runs(places: Tensor) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs without gaps, (start, end): a prompt has one, or two if it has a shared prefix."""
    breaks = (places.diff() != 1).nonzero()[:, 0] + 1
    for run in places.tensor_split(breaks):
        yield int(run[0]), int(run[-1]) + 1


def _keeps_nothing(model: Any) -> ModelError:
    return ModelError(f"{type(model).__name__} keeps no key-value cache, which generation needs.")
