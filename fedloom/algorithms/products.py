"""The mean of low-rank products at the adapters' own rank; nothing of a weight's size is built."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom import lora
from fedloom.state import AdapterState


def mean_product(parts: Sequence[tuple[float, AdapterState]]) -> AdapterState:
    """The adapter whose products B A are nearest to sum_k p_k B_k A_k, target by target, in the Frobenius norm.

    `parts` are (p_k, adapter k), all of one LoRA scale, which drops out. The result has the rank and dtype of the
    first. Exact where the sum has no higher rank, else the best there is. Raises: ShapeMismatch, for an adapter with
    a tensor that is neither factor.
    """
    first = parts[0][1]
    rank = next(iter(lora.pairs(first).values())).rank
    return lora.truncate(lora.stack(parts), rank).to(next(iter(first.values())).dtype)
