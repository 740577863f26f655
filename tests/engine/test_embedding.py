"""An embedding is the mean last hidden state of the base model, whatever a text is batched with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedloom.engine import embedding
from fedloom.engine.embedding import embed
from fedloom.engine.models import RANDOM, load_base
from fedloom.errors import ConfigError, DataError

TEXTS = [[5, 6, 7, 8, 9], [11], [3, 4, 5], list(range(20, 50)), [8, 7]]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_base("random:llama", dtype="float32", device="cpu")[0]


def one_by_one(model: Any, texts: list[list[int]]) -> np.ndarray:
    """The same through the whole model with its logits, a text at a time and so without padding."""
    with torch.no_grad():
        last = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0] for ids in texts]
    return torch.stack([states.mean(0) for states in last]).numpy()


@pytest.mark.parametrize("kind", RANDOM)
def test_it_is_the_mean_of_the_last_hidden_states_for_every_architecture(kind: str) -> None:
    base = load_base(f"random:{kind}", dtype="float32", device="cpu")[0]
    vectors = embed(base, TEXTS)
    assert (vectors.shape, vectors.dtype) == ((5, 64), np.float32)
    assert np.abs(vectors - one_by_one(base, TEXTS)).max() < 2e-5


def test_batches_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = embed(model, TEXTS)
    monkeypatch.setattr(embedding, "TOKENS", 6)
    sizes: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    apart = embed(model, TEXTS)
    hook.remove()
    assert sizes == [(2, 2), (1, 3), (1, 5), (1, 30)]  # 3 * 3 and 2 * 5 are more than 6; one text always fits
    assert np.abs(together - apart).max() < 1e-5


def test_no_logits_are_computed(model: Any) -> None:
    called: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: called.append(1))
    embed(model, TEXTS)
    hook.remove()
    assert called == []


def test_a_long_text_is_cut(model: Any) -> None:
    assert np.abs(embed(model, [TEXTS[3]], longest=4) - embed(model, [TEXTS[3][:4]])).max() == 0


def test_a_text_longer_than_the_model_is_cut_to_its_positions() -> None:
    base = load_base("random:gpt2", dtype="float32", device="cpu")[0]  # learnt positions: 1,024 of them
    text = [3 + i % 50 for i in range(1100)]
    assert np.abs(embed(base, [text], longest=5000) - embed(base, [text[:1024]], longest=5000)).max() == 0


def test_what_the_model_computes_in_does_not_show() -> None:
    base = load_base("random:llama", dtype="bfloat16", device="cpu")[0]
    vectors = embed(base, TEXTS)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


def test_no_texts_give_no_rows(model: Any) -> None:
    assert embed(model, []).shape == (0, 64)


def test_a_text_without_tokens_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="1 of 3 texts have no token to embed, first: text 1"):
        embed(model, [[5], [], [6]])


def test_a_limit_of_no_tokens_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="longest of at least 1, got 0"):
        embed(model, TEXTS, longest=0)
