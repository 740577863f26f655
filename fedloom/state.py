"""AdapterState: named tensors that add, subtract and scale like one vector."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from fedloom.errors import ShapeMismatch

if TYPE_CHECKING:  # settings load without torch
    import torch
    from torch import Tensor


class AdapterState(Mapping[str, "Tensor"]):
    """An immutable vector of named tensors: LoRA factors, a delta, a control variate.

    Names are PEFT's on-disk keys (`base_model.model.<module>.lora_A.weight`), so a state saves to a
    PEFT adapter unchanged. Arithmetic is elementwise and requires equal names and shapes.

    >>> w = AdapterState({"q.lora_B": torch.ones(2, 2)})
    >>> (0.5 * w + w).norm()
    3.0
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = {name: tensors[name].detach() for name in sorted(tensors)}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"AdapterState({len(self)} tensors, {self.numel():,} values)"

    def map(self, fn: Callable[..., Tensor], *others: AdapterState | float) -> AdapterState:
        """Apply `fn` tensor by tensor; numbers in `others` are passed as they are."""
        for other in others:
            if isinstance(other, AdapterState):
                self.check_compatible(other)
        return AdapterState(
            {
                name: fn(t, *(o[name] if isinstance(o, AdapterState) else o for o in others))
                for name, t in self.items()
            }
        )

    def __add__(self, other: AdapterState | float) -> AdapterState:
        return self.map(operator.add, other)

    def __sub__(self, other: AdapterState | float) -> AdapterState:
        return self.map(operator.sub, other)

    def __mul__(self, other: AdapterState | float) -> AdapterState:
        return self.map(operator.mul, other)

    def __truediv__(self, other: AdapterState | float) -> AdapterState:
        return self.map(operator.truediv, other)

    __rmul__ = __mul__

    def sqrt(self) -> AdapterState:
        return self.map(lambda t: t.sqrt())

    def zeros_like(self) -> AdapterState:
        import torch

        return self.map(torch.zeros_like)

    def to(self, dtype: torch.dtype) -> AdapterState:
        return self.map(lambda t: t.to(dtype))

    def norm(self) -> float:
        """L2 norm over all tensors together, as one flat vector, summed in float64."""
        return float(sum((t.double() ** 2).sum() for t in self.values()) ** 0.5)

    def numel(self) -> int:
        return sum(t.numel() for t in self.values())

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.values())

    def subnormal(self) -> int:
        """How many nonzero values are subnormal, too small for normal floating point."""
        import torch

        return sum(int(((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).sum()) for t in self.values())

    def sha256(self) -> str:
        """Hash of names, shapes, dtypes and bytes, in name order: equal exactly when the states are."""
        import torch

        digest = hashlib.sha256()
        for name, t in self.items():
            digest.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
            digest.update(t.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check_compatible(self, other: AdapterState) -> None:
        """Raise ShapeMismatch unless `other` has the same names and shapes."""
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())
            raise ShapeMismatch(f"adapters differ in {len(odd)} tensors, first: {odd[0]!r}")
        for name, t in self.items():
            if t.shape != other[name].shape:
                raise ShapeMismatch(f"{name!r}: {tuple(t.shape)} vs {tuple(other[name].shape)}")

    # A Mapping compares by value, which tensors cannot; use sha256() or torch.equal by tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__
