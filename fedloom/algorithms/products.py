"""Sums of low-rank products, never multiplied out: nothing of a weight's size (out x in) is ever built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloom.errors import ShapeMismatch
from fedloom.state import AdapterState

_A, _B = ".lora_A.weight", ".lora_B.weight"


def mean_product(parts: Sequence[tuple[float, AdapterState]]) -> AdapterState:
    """The adapter whose products B A are nearest to sum_k p_k B_k A_k, target by target, in the Frobenius norm.

    `parts` are (p_k, adapter k), all of equal ranks and one LoRA scale, which drops out. The new A has orthonormal
    rows and B the singular values. Exact where the sum has no higher rank, else the best there is (Eckart and
    Young). Raises: ShapeMismatch, for an adapter with a tensor that is neither factor.
    """
    first = parts[0][1]
    found: dict[str, Tensor] = {}
    for target, rank in _targets(first).items():
        a = torch.cat([state[target + _A].double() for _, state in parts])  # (K r, in)
        b = torch.cat([p * state[target + _B].double() for p, state in parts], 1)  # (out, K r)
        new_b, new_a = truncated(b, a, rank)
        found[target + _A] = new_a.to(first[target + _A].dtype)
        found[target + _B] = new_b.to(first[target + _B].dtype)
    return AdapterState(found)


def truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """b (out, R), a (R, in) -> (out, rank), (rank, in), whose product is the best of that rank to b a.

    A QR decomposition of either factor leaves the singular values in a core of R x R at most. A rank that out, in
    and R do not allow is filled up with zeros.
    """
    left, core_b = torch.linalg.qr(b)  # (out, m), (m, R)
    right, core_a = torch.linalg.qr(a.T)  # (in, n), (n, R)
    u, s, v = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    new_b, new_a = (left @ u[:, :rank]) * s[:rank], v[:rank] @ right.T
    missing = rank - len(new_a)
    return torch.nn.functional.pad(new_b, (0, missing)), torch.nn.functional.pad(new_a, (0, 0, 0, missing))


def _targets(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Target -> rank."""
    targets = {name.removesuffix(_A): len(t) for name, t in state.items() if name.endswith(_A)}
    expected = {target + end for target in targets for end in (_A, _B)}
    if odd := sorted(expected ^ set(state)):
        raise ShapeMismatch(
            f"expected LoRA factors A and B of every target; {odd[0]!r} is missing or is neither"
        )
    return targets
