"""Random tiny models and random examples, shared by the tests of the engine."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedloom.engine.fitting import batches
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.lora_engine import LoraEngine
from fedloom.state import AdapterState
from fedloom.steps import Fit, LocalTraining, LoraSpec, Tokens

VOCABULARY = 120
LOCAL = LocalTraining(batch_size=4, learning_rate=3e-3)
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


def engine(
    model: Any,
    *,
    lora: LoraSpec | None = None,
    encode: Callable[[Any], Tokens] = lambda tokens: tokens,
    **options: Any,
) -> LoraEngine:
    """An engine over a copy of `model`; unless told otherwise, examples already are Tokens."""
    return LoraEngine.build(
        copy.deepcopy(model),
        encode,
        lora=lora or LoraSpec(rank=4, alpha=8.0),
        **options,
    )


def moved(layout: AdapterLayout, dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterState:
    """An adapter as a later round has it: both factors away from zero."""
    stream = torch.Generator().manual_seed(seed)
    start = layout.to_vector(layout.initial(seed)).to(dtype)
    return layout.to_state(start + 0.05 * torch.randn(layout.size, generator=stream, dtype=dtype))


def distance(one: AdapterState, other: AdapterState) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def plain_peft(model: Any, spec: LoraSpec) -> Any:
    """`model` in PEFT, untouched by us but for the adapter's dtype."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed property
        return get_peft_model(copy.deepcopy(model), config).to(model.dtype).eval()


def peft_factors(peft: Any) -> dict[str, torch.nn.Parameter]:
    return {n.replace(".default", ""): p for n, p in peft.named_parameters() if p.requires_grad}


def train_by_hand(peft: Any, fit: Fit) -> AdapterState:
    """One client after the textbook: padded batches, cross-entropy over their labels, torch's AdamW or SGD.

    Of the request it takes the examples and their order, `local`, `train` and an anchor; the rest is up to `peft`.
    """
    factors = peft_factors(peft)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(fit.adapter[name])
    local = fit.local
    params = [factor for name, factor in factors.items() if any(f"lora_{side}" in name for side in fit.train)]
    anchor, mu = fit.correction.anchor, fit.correction.mu
    optimizer: torch.optim.Optimizer = torch.optim.SGD(params, lr=local.learning_rate)
    if local.optimizer == "adamw":
        optimizer = torch.optim.AdamW(params, lr=local.learning_rate, weight_decay=local.weight_decay)
    for places in batches(fit):
        batch = [fit.examples[index] for index, _ in places]
        longest = max(len(tokens.ids) for tokens in batch)
        ids, mask, labels = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
        labels.fill_(-100)
        for i, tokens in enumerate(batch):
            n = len(tokens.ids)
            ids[i, :n], mask[i, :n] = torch.tensor(tokens.ids), 1
            labels[i, :n] = torch.where(torch.tensor(tokens.labelled), ids[i, :n], -100)
        optimizer.zero_grad()
        logits = peft(input_ids=ids, attention_mask=mask).logits[:, :-1]  # .loss would round to float32
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        if anchor is not None:
            for name, factor in factors.items():
                factor.grad.add_(factor.detach() - anchor[name], alpha=mu)
        torch.nn.utils.clip_grad_norm_(params, local.clip or math.inf)
        optimizer.step()
    return AdapterState({name: p.detach().clone() for name, p in factors.items()})


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
