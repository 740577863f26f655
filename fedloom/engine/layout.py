"""Where each LoRA factor of an adapter lives in one flat vector, and under which name on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom import rng
from fedloom.errors import ModelError, ShapeMismatch
from fedloom.state import AdapterState
from fedloom.steps import LoraSpec

ON_DISK = "base_model.model."  # PEFT puts it in front of every module name


@dataclass(frozen=True)
class Target:
    """One adapted linear map: `lora_A` (rank, inputs) at `offset`, `lora_B` (outputs, rank) after it."""

    name: str
    kind: Literal["linear", "conv1d", "opaque"]  # opaque: quantised, known by its forward only
    inputs: int
    outputs: int
    rank: int
    scale: float
    offset: int

    @property
    def split(self) -> int:
        return self.offset + self.rank * self.inputs

    @property
    def end(self) -> int:
        return self.split + self.outputs * self.rank

    @property
    def a_key(self) -> str:
        return f"{ON_DISK}{self.name}.lora_A.weight"

    @property
    def b_key(self) -> str:
        return f"{ON_DISK}{self.name}.lora_B.weight"

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
        targets: list[Target] = []
        offset = 0
        for name in chosen:
            kind, inputs, outputs = _describe(linear[name])
            targets.append(Target(name, kind, inputs, outputs, spec.rank, spec.scale, offset))
            offset = targets[-1].end
        return cls(spec, tuple(targets))

    @property
    def size(self) -> int:
        """How many numbers an adapter has."""
        return self.targets[-1].end

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def to_state(self, vector: Tensor) -> AdapterState:
        """The named tensors of a flat vector, as copies on the CPU that share no memory with it."""
        vector = vector.detach().to("cpu", copy=True)
        tensors: dict[str, Tensor] = {}
        for target in self.targets:
            tensors[target.a_key] = target.a(vector)  # (r, in)
            tensors[target.b_key] = target.b(vector)  # (out, r)
        return AdapterState(tensors)

    def to_vector(self, state: AdapterState) -> Tensor:
        """One flat vector in the dtype of `state`. Raises ShapeMismatch if its tensors are not ours."""
        shapes: dict[str, tuple[int, int]] = {}
        for target in self.targets:
            shapes[target.a_key] = (target.rank, target.inputs)
            shapes[target.b_key] = (target.outputs, target.rank)
        if odd := sorted(shapes.keys() ^ state.keys()):
            raise ShapeMismatch(f"adapter and model differ in {len(odd)} tensors, first: {odd[0]!r}")
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                raise ShapeMismatch(f"{name!r}: expected {shape}, got {tuple(state[name].shape)}")
        return torch.cat([state[name].reshape(-1) for name in shapes])

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


def _describe(module: nn.Module) -> tuple[Literal["linear", "conv1d", "opaque"], int, int]:
    if isinstance(module, Conv1D):
        return "conv1d", *module.weight.shape
    assert isinstance(module, nn.Linear)
    plain = type(module) is nn.Linear and module.weight.is_floating_point()
    return "linear" if plain else "opaque", module.in_features, module.out_features
