"""A base model that answers under many adapters at once: what generation needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.engine.bank import AdapterBank, RowGroup, Tuning
from fedloom.engine.forward import PackedModel
from fedloom.engine.layers import ActivePass
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Pass
from fedloom.steps import Generate


@dataclass
class ServedModel:
    model: Any  # with its LoRA layers in place
    layout: AdapterLayout
    active: ActivePass
    packed: PackedModel | None  # None: the fast path does not fit this model
    dtype: torch.dtype  # of the adapters
    # Why answers are left to the model's own cache and attention; empty: they are not.
    decoding_reason: str = ""

    @contextmanager
    def rows(self, tunings: Mapping[Hashable, Tuning]) -> Iterator[Rows]:
        """Serve these, each under its key, from one model.

        Inside, the model has the attention it was loaded with ("sdpa"), dropout is off and no gradient is
        kept. A forward runs under `rows.tokens(owner)`; without it, it is the base model's.
        """
        tuned = {key: tuning for key, tuning in tunings.items() if not tuning.is_base}
        bank = AdapterBank(
            self.layout, list(tuned.values()), dtype=self.dtype, device=self.model.device, training=False
        )
        index = dict.fromkeys(tunings, -1) | {key: row for row, key in enumerate(tuned)}
        group = RowGroup(bank, range(len(tuned)))
        with torch.no_grad():
            yield Rows(index, group, self.active, self.model.dtype)


@dataclass(frozen=True)
class Rows:
    """Adapters in a bank, ready to serve."""

    index: Mapping[Hashable, int]  # key -> its value in `owner`; -1: the base alone
    group: RowGroup
    active: ActivePass
    dtype: torch.dtype

    @contextmanager
    def tokens(self, owner: Tensor) -> Iterator[None]:
        """Run forwards inside whose tokens belong to `owner`.

        `owner` has the shape of `input_ids`, (B, L), padding included; values are those of `index`. While
        decoding with a cache, L is 1: pass (B, 1). It may be any mixture in any order.
        """
        lora = Pass.of(self.group, owner.reshape(-1).to(self.group.bank.params.device), dtype=self.dtype)
        with self.active.using(lora):
            yield


# (model, requests) -> a list of token ids a prompt
Generation = Callable[[ServedModel, Mapping[Hashable, Generate]], dict[Hashable, list[list[int]]]]
