"""Texts as vectors: the base model's last hidden states, averaged over each text's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedloom.errors import ConfigError, DataError

TOKENS = 8192  # in a batch, padding included


@torch.no_grad()
def embed(model: Any, texts: Sequence[Sequence[int]], *, longest: int = 512) -> np.ndarray:
    """(n, d) float32: for each text, the mean over its tokens of the last hidden states.

    `model` is a causal language model as `load_base` gives it, before an engine is built over it. Of each
    text only the first `longest` tokens are read, fewer where the model has fewer positions. No logits
    are computed. Batching changes only the last bits of a vector. Raises DataError for a text without tokens.
    """
    if longest < 1:
        raise ConfigError(f"Expected longest of at least 1, got {longest}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    kept = [list(ids[: min(longest, positions)]) for ids in texts]
    if empty := [i for i, ids in enumerate(kept) if not ids]:
        raise DataError(f"{len(empty)} of {len(kept)} texts have no token to embed, first: text {empty[0]}.")
    device = model.get_input_embeddings().weight.device
    rows: list[tuple[int, np.ndarray]] = []
    for batch in _batches(kept):
        width = max(len(kept[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long, device=device)  # (b, n)
        for row, i in enumerate(batch):
            ids[row, : len(kept[i])] = torch.tensor(kept[i])
        # No mask: padding is on the right, where causal attention never looks.
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (b, n, d)
        for states, i in zip(hidden.float(), batch, strict=True):
            rows.append((i, states[: len(kept[i])].mean(0).cpu().numpy()))
    if not rows:
        return np.zeros((0, model.config.get_text_config().hidden_size), dtype=np.float32)
    return np.stack([vector for _, vector in sorted(rows, key=lambda row: row[0])])


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of texts of like length together, each batch within TOKENS, one text at least."""
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if batch and (len(batch) + 1) * len(texts[i]) > TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
