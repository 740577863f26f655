"""Where each LoRA factor of an adapter lives in one flat vector, and its name on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom import lora, rng
from fedloom.errors import ModelError, ShapeMismatch
from fedloom.state import AdapterState
from fedloom.steps import LoraSpec


@dataclass(frozen=True)
class Target:
    """One adapted linear map: `lora_A` (rank, inputs) at `offset`, `lora_B` (outputs, rank) after it."""

    name: str
    kind: Literal["linear", "conv1d", "opaque"]  # opaque: quantised, known by its forward only
    inputs: int
    outputs: int
    rank: int
    offset: int

    @property
    def split(self) -> int:
        return self.offset + self.rank * self.inputs

    @property
    def end(self) -> int:
        return self.split + self.outputs * self.rank

    @property
    def key(self) -> str:
        """Its name on disk, without the factor."""
        return lora.ON_DISK + self.name

    def a(self, flat: Tensor) -> Tensor:
        """A view of `lora_A` in flat vectors: (..., P) -> (..., rank, inputs)."""
        return flat[..., self.offset : self.split].unflatten(-1, (self.rank, self.inputs))

    def b(self, flat: Tensor) -> Tensor:
        """A view of `lora_B` in flat vectors: (..., P) -> (..., outputs, rank)."""
        return flat[..., self.split : self.end].unflatten(-1, (self.outputs, self.rank))


@dataclass(frozen=True)
class AdapterLayout:
    """The targets of one model in module order; an adapter is a vector of `size` numbers."""

    spec: LoraSpec
    targets: tuple[Target, ...]

    @classmethod
    def of(cls, model: nn.Module, spec: LoraSpec) -> AdapterLayout:
        """Find the targets. "all-linear" means what it means to PEFT: every linear map but the output head."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
        if spec.targets == "all-linear":
            chosen = list(linear)
        else:
            wanted = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
            chosen = [name for name in linear if any(_ends_with(name, end) for end in wanted)]
            for end in wanted:
                if not any(_ends_with(name, end) for name in chosen):
                    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
                    raise ModelError(
                        f"No linear module is called {end!r}; this model has {', '.join(known)}."
                    )
        if not chosen:
            raise ModelError("The model has no linear module to adapt.")
        unplaced = [Target(name, *_describe(linear[name]), spec.rank, 0) for name in chosen]
        return cls(spec, _placed(unplaced, spec.rank))

    def with_rank(self, rank: int) -> AdapterLayout:
        """The same targets for adapters of another rank."""
        return replace(self, spec=replace(self.spec, rank=rank), targets=_placed(self.targets, rank))

    @property
    def size(self) -> int:
        """How many numbers an adapter has."""
        return self.targets[-1].end

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __getitem__(self, name: str) -> Target:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Target]:
        return {target.name: target for target in self.targets}

    def ranks(self, state: AdapterState, *, partial: bool = False) -> tuple[int, ...]:
        """The rank that `state` has for each target, at most ours. `partial`: 0 where it lacks a target.

        Raises ShapeMismatch if its tensors are not ours.
        """
        keys = {lora.key(target.key, side) for target in self.targets for side in lora.SIDES}
        odd = sorted(state.keys() - keys if partial else keys ^ state.keys())
        if odd:
            raise ShapeMismatch(f"adapter and model differ in {len(odd)} tensors, first: {odd[0]!r}")
        factors = lora.pairs(state)
        found: list[int] = []
        for target in self.targets:
            pair = factors.get(target.key)
            rank = pair.rank if pair else 0
            found.append(rank)
            if pair is None:
                continue
            for side, tensor, lower, full in (
                ("A", pair.a, (rank, target.inputs), (target.rank, target.inputs)),
                ("B", pair.b, (target.outputs, rank), (target.outputs, target.rank)),
            ):
                if tuple(tensor.shape) != lower or not 1 <= rank <= target.rank:
                    raise ShapeMismatch(
                        f"'{target.key}.lora_{side}': expected {full} or a lower rank, got {tuple(tensor.shape)}"
                    )
        return tuple(found)

    def to_state(self, vector: Tensor, ranks: Sequence[int] | None = None) -> AdapterState:
        """The named tensors of a flat vector, as copies on the CPU that share no memory with it.

        `ranks`, one a target, cut off the zeros that `to_vector` filled up with.
        """
        vector = vector.detach().to("cpu", copy=True)
        factors: dict[str, lora.Pair] = {}
        for target, rank in zip(self.targets, ranks or (self.spec.rank,) * len(self.targets), strict=True):
            factors[target.key] = lora.Pair(target.a(vector)[:rank], target.b(vector)[:, :rank].contiguous())
        return lora.state_of(factors)

    def to_vector(self, state: AdapterState, *, partial: bool = False) -> Tensor:
        """One flat vector in the dtype of `state`; a lower rank is filled up with zeros.

        `partial`: so is a target that `state` lacks. Raises ShapeMismatch if its tensors are not ours.
        """
        ranks, factors = self.ranks(state, partial=partial), lora.pairs(state)
        if all(rank == self.spec.rank for rank in ranks):
            return torch.cat([t.reshape(-1) for target in self.targets for t in factors[target.key]])
        vector = torch.zeros(self.size, dtype=next((t.dtype for t in state.values()), torch.float32))
        for target, rank in zip(self.targets, ranks, strict=True):
            if rank:
                target.a(vector)[:rank] = factors[target.key].a
                target.b(vector)[:, :rank] = factors[target.key].b
        return vector

    def mask(self, side: lora.Side) -> Tensor:
        """Which numbers of a flat vector belong to the factors of one side: (P,) bool."""
        found = torch.zeros(self.size, dtype=torch.bool)
        for target in self.targets:
            (target.a if side == "A" else target.b)(found).fill_(True)
        return found

    def initial(self, seed: int) -> AdapterState:
        """Where training starts: A uniform as PEFT draws it, B zero, so that the model is unchanged."""
        vector = torch.zeros(self.size)
        for target in self.targets:
            bound = 1 / math.sqrt(target.inputs)  # kaiming_uniform_ with a = sqrt(5)
            drawn = rng.numpy_stream(seed, "adapter", target.name).uniform(
                -bound, bound, (target.rank, target.inputs)
            )
            target.a(vector).copy_(torch.from_numpy(drawn))
        return self.to_state(vector)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _placed(targets: Iterable[Target], rank: int) -> tuple[Target, ...]:
    """One after the other in a flat vector, for adapters of this rank."""
    placed: list[Target] = []
    for target in targets:
        placed.append(replace(target, rank=rank, offset=placed[-1].end if placed else 0))
    return tuple(placed)


def _describe(module: nn.Module) -> tuple[Literal["linear", "conv1d", "opaque"], int, int]:
    if isinstance(module, Conv1D):
        return "conv1d", *module.weight.shape
    assert isinstance(module, nn.Linear)
    plain = type(module) is nn.Linear and module.weight.is_floating_point()
    return "linear" if plain else "opaque", module.in_features, module.out_features
