"""Random tiny models and random examples, shared by the tests of the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedloom.engine.fitting import LocalTraining
from fedloom.engine.layout import AdapterLayout, LoraSpec
from fedloom.engine.lora_engine import LoraEngine
from fedloom.state import AdapterState
from fedloom.steps import Tokens

VOCABULARY = 120
_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def causal_lm(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return causal_lm(transformers.LlamaConfig(**{**_SHAPE, **options}), dtype)


def shape(**options: Any) -> dict[str, Any]:
    return {**_SHAPE, **options}


def example(length: int, seed: int, *, labelled: int | None = None) -> Tokens:
    """Random tokens; the last `labelled` (default half) count for the loss."""
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    first = length - (length // 2 if labelled is None else labelled)
    return Tokens(tuple(ids), tuple(i >= max(first, 1) for i in range(length)))


def examples(count: int, seed: int = 0) -> list[Tokens]:
    return [example(5 + (7 * i + 3 * seed) % 29, 1000 * seed + i) for i in range(count)]


def engine(model: Any, *, lora: LoraSpec | None = None, local: LocalTraining | None = None, **options: Any) -> Any:
    """An engine over a copy of `model`, whose examples already are Tokens."""
    return LoraEngine.build(
        copy.deepcopy(model),
        lambda tokens: tokens,
        lora=lora or LoraSpec(rank=4, alpha=8.0),
        local=local or LocalTraining(batch_size=4, learning_rate=3e-3),
        **options,
    )


def moved(layout: AdapterLayout, dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterState:
    """An adapter as a later round has it: both factors away from zero."""
    stream = torch.Generator().manual_seed(seed)
    start = layout.to_vector(layout.initial(seed)).to(dtype)
    return layout.to_state(start + 0.05 * torch.randn(layout.size, generator=stream, dtype=dtype))


def distance(one: AdapterState, other: AdapterState) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@contextmanager
def norms_in_double() -> Iterator[None]:
    """transformers' RMSNorm computes in float32 even inside a float64 model; here it does not."""
    before = LlamaRMSNorm.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = before
