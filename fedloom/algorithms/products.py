"""The mean of low-rank products at the adapters' own rank, without building anything the size of a weight."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom import lora
from fedloom.state import AdapterState


def mean_product(parts: Sequence[tuple[float, AdapterState]]) -> AdapterState:
    """The adapter whose products B A are nearest to sum_k p_k B_k A_k for every target, in Frobenius norm.

    `parts` are (p_k, adapter k), all with the same LoRA scale, which cancels. The result has the rank and
    dtype of the first. It is exact if the sum has no higher rank, else the best approximation. Raises:
    ShapeMismatch, for an adapter with a tensor that is neither factor.
    """
    first = parts[0][1]
    rank = next(iter(lora.pairs(first).values())).rank
    return lora.truncate(lora.stack(parts), rank).to(next(iter(first.values())).dtype)
