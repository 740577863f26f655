"""LoRA states as pairs of factors: PEFT's key grammar, and arithmetic on their products.

A target's update is the product B A of `lora_B` (out, r) and `lora_A` (r, in). Nothing the size of a weight,
(out, in), is ever built here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from fedloom.errors import ShapeMismatch
from fedloom.state import AdapterState

if TYPE_CHECKING:  # settings load without torch
    from torch import Tensor

Side = Literal["A", "B"]
SIDES: tuple[Side, ...] = ("A", "B")

ON_DISK = "base_model.model."  # PEFT puts it in front of every module name
_ENDS: Mapping[Side, str] = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


class Pair(NamedTuple):
    """The two factors of one target."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)

    @property
    def rank(self) -> int:
        return len(self.a)


def key(target: str, side: Side) -> str:
    """The name of a target's factor. `target`: a module's name on disk, `ON_DISK` and its name in the model."""
    return target + _ENDS[side]


def parse(name: str) -> tuple[str, Side] | None:
    """The target and side in a tensor's name; None if it does not name a LoRA factor."""
    for side, end in _ENDS.items():
        if name.endswith(end):
            return name.removesuffix(end), side
    return None


def pairs(state: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Target -> its factors. Raises ShapeMismatch for any other tensor, or a factor without its partner."""
    targets = dict.fromkeys(found[0] for name in state if (found := parse(name)))
    expected = {key(target, side) for target in targets for side in _ENDS}
    if odd := sorted(expected ^ set(state)):
        raise ShapeMismatch(
            f"expected LoRA factors A and B of every target; {odd[0]!r} is missing or is neither"
        )
    found_pairs = {target: Pair(state[key(target, "A")], state[key(target, "B")]) for target in targets}
    for target, (a, b) in found_pairs.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ShapeMismatch(
                f"{target!r}: expected lora_A (r, in) and lora_B (out, r), got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    return found_pairs


def state_of(factors: Mapping[str, Pair]) -> AdapterState:
    """The inverse of `pairs`."""
    tensors: dict[str, Tensor] = {}
    for target, (a, b) in factors.items():
        tensors[key(target, "A")], tensors[key(target, "B")] = a, b
    return AdapterState(tensors)


def only(state: Mapping[str, Tensor], side: Side) -> AdapterState:
    """Half a state: the factors of one side. `AdapterState({**a, **b})` puts two halves together."""
    return AdapterState({name: t for name, t in state.items() if name.endswith(_ENDS[side])})


def stack(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> AdapterState:
    """The adapter whose products are exactly sum_k c_k B_k A_k; `parts` are (c_k, adapter k). In float64.

    The factors lie side by side, so ranks add up; c_k goes into B. Ranks may differ, and a part may lack
    targets.
    """
    found = [(c, pairs(state)) for c, state in parts]
    return state_of({t: _stacked(t, found) for t in dict.fromkeys(t for _, own in found for t in own)})


def _stacked(target: str, parts: Sequence[tuple[float, Mapping[str, Pair]]]) -> Pair:
    import torch

    own = [(c, factors[target]) for c, factors in parts if target in factors]
    try:
        return Pair(
            torch.cat([pair.a.double() for _, pair in own]),  # (sum of r, in)
            torch.cat([c * pair.b.double() for c, pair in own], 1),  # (out, sum of r)
        )
    except RuntimeError as error:
        shapes = sorted({(pair.b.shape[0], pair.a.shape[1]) for _, pair in own})
        raise ShapeMismatch(f"{target!r}: cannot add up updates of shapes {shapes}") from error


def truncate(state: Mapping[str, Tensor], rank: int) -> AdapterState:
    """The adapter of this rank whose products are nearest those of `state`, in Frobenius norm. In float64.

    The new A has orthonormal rows and B holds the singular values (Eckart and Young). Where the shapes do not
    allow this rank, zeros fill the rest.
    """
    return state_of({target: _truncated(pair, rank) for target, pair in pairs(state).items()})


def _truncated(pair: Pair, rank: int) -> Pair:
    """A QR decomposition of either factor leaves the singular values in a core of R x R at most."""
    import torch

    left, core_b = torch.linalg.qr(pair.b.double())  # (out, m), (m, R)
    right, core_a = torch.linalg.qr(pair.a.double().T)  # (in, n), (n, R)
    u, s, v = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    b, a = (left @ u[:, :rank]) * s[:rank], v[:rank] @ right.T
    missing = rank - len(a)
    return Pair(torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))


def product_norm(state: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of all products together, from r x r matrices: ||B A||^2 = tr((B'B)(A A'))."""
    total = 0.0
    for a, b in pairs(state).values():
        a, b = a.double(), b.double()
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return float(max(total, 0.0) ** 0.5)
