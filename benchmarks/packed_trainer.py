"""The best single-client trainer we can build from other people's parts; fedloom should beat it slightly.

Hugging Face's Trainer over PEFT, an optimizer batch laid end to end without padding, torch's variable-length
flash attention, no checkpointing, and Liger's norms, rotations, SwiGLU and loss where `liger_kernel` is
installed. One client after the other, like every other peer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, DataCollatorWithFlattening
from transformers.models.llama import modeling_llama

from benchmarks import hf_trainer
from benchmarks.rounds import LEARNING_RATE, Ids, Outcome, Setting
from benchmarks.workload import Encode, Example, Work
from fedloom.state import AdapterState

PLAIN, LIGER = "HF Trainer, packed", "HF Trainer, packed, Liger"
_ATTENTION = "benchmarks_packed"


def has_liger() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def run(
    model: Any,
    setting: Setting,
    encode: Encode,
    start: AdapterState,
    data: Sequence[Sequence[Example]],
    *,
    liger: bool,
) -> Outcome:
    """The rounds of `setting`, from `start`. The clock starts when the model has its adapter."""
    with _with_liger(model) if liger else nullcontext():
        model.config._attn_implementation = _ATTENTION
        peft = hf_trainer.with_lora(model, setting)
        return hf_trainer.client_by_client(peft, setting, start, data, partial(_fit, peft, setting, encode))


class _Flattened:
    """A collator that lays examples end to end and records them."""

    def __init__(self) -> None:
        self.inner = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        self.consumed: list[Ids] = []

    def __call__(self, features: Sequence[Any]) -> Any:
        self.consumed += [tuple(feature["input_ids"]) for feature in features]
        return self.inner(features)


def _fit(
    peft: Any, setting: Setting, encode: Encode, examples: Sequence[Example], folder: str, outcome: Outcome
) -> list[Ids]:
    tokens = [encode(example) for example in examples]
    rows = [
        {
            "input_ids": list(t.ids),
            "labels": [i if counts else -100 for i, counts in zip(t.ids, t.labelled, strict=True)],
        }
        for t in tokens
    ]
    collator = _Flattened()
    args = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=setting.batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        bf16=torch.cuda.is_available(),  # autocast: LoRA's products in bfloat16
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=peft, args=args, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    count, labelled = (sum(values) for values in zip(*((len(t.ids), t.targets) for t in tokens), strict=True))
    outcome.work += Work(count, labelled, count)
    return collator.consumed


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, D) -> (1, T, H, D). Without a GPU, plain attention, to try the program."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends, longest = cu_seq_lens_q.flatten().to(torch.int32), int(max_length_q)
        out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
        return out[None], None
    sizes = cu_seq_lens_q.flatten().diff().tolist()
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in parts
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def _with_liger(model: Any) -> Iterator[None]:
    """Liger also patches transformers' module; undo that, since other contestants run after this one."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    with patch.multiple(modeling_llama, **{name: getattr(modeling_llama, name) for name in names}):
        apply_liger_kernel_to_llama(model=model)
        yield
