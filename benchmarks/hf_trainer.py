"""Our own baseline: Hugging Face's Trainer over PEFT, one client after the other.

It does a peer's work without avoidable costs: examples are read from memory, nothing is saved, nothing
logged. Where no clone of a peer is given, it stands in under its own name.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.contest import Stopwatch
from benchmarks.rounds import LEARNING_RATE, Ids, Outcome, Recorder, Setting, weighted
from benchmarks.workload import Encode, Example, adapter_of, put
from fedloom.state import AdapterState

NAME = "HF Trainer per client"


def with_lora(model: Any, setting: Setting) -> Any:
    lora = setting.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=0.0,
        target_modules=list(setting.targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed property
        peft = get_peft_model(model, config)
    peft.config.use_cache = False
    if setting.checkpointing:
        peft.enable_input_require_grads()
    return peft


def chosen(setting: Setting, data: Sequence[Sequence[Example]], number: int) -> list[list[Example]]:
    """The clients of a round and each one's examples."""
    draw = np.random.default_rng(number)
    cohort = draw.choice(len(data), setting.per_round, replace=False)
    most = None if setting.steps is None else setting.steps * setting.batch
    return [[data[c][i] for i in draw.permutation(len(data[c]))[:most]] for c in cohort]


def run(
    model: Any,
    setting: Setting,
    encode: Encode,
    start: AdapterState,
    data: Sequence[Sequence[Example]],
    tokenizer: Any,
) -> Outcome:
    """The rounds of `setting`, from `start`. The clock starts when the model has its adapter."""
    peft = with_lora(model, setting)

    def tune(examples: Sequence[Example], folder: str, outcome: Outcome) -> list[Ids]:
        return fit(peft, setting, encode, examples, tokenizer, folder, outcome)

    return client_by_client(peft, setting, start, data, tune)


def client_by_client(
    peft: Any,
    setting: Setting,
    start: AdapterState,
    data: Sequence[Sequence[Example]],
    tune: Callable[[Sequence[Example], str, Outcome], list[Ids]],
) -> Outcome:
    """The rounds of a federation. `tune` trains on a client's examples and returns their order.

    It is given a folder for its files.
    """
    outcome = Outcome(start, Stopwatch())
    with tempfile.TemporaryDirectory() as folder, outcome.watch.running():
        for number in range(setting.rounds):
            trained, consumed = [], []
            for examples in chosen(setting, data, number):
                put(peft, outcome.adapter)
                consumed.append(tune(examples, folder, outcome))
                trained.append(adapter_of(peft))
            total = sum(map(len, consumed))
            outcome.consumed.append(consumed)
            outcome.shares.append([len(mine) / total for mine in consumed])
            outcome.adapter = weighted(trained, outcome.shares[-1])
    return outcome


def fit(
    peft: Any,
    setting: Setting,
    encode: Encode,
    examples: Sequence[Example],
    tokenizer: Any,
    folder: str,
    outcome: Outcome,
) -> list[tuple[int, ...]]:
    """Train on a client's examples; returns the order in which they were used."""
    rows = []
    for tokens in map(encode, examples):
        labels = [i if counts else -100 for i, counts in zip(tokens.ids, tokens.labelled, strict=True)]
        rows.append({"input_ids": list(tokens.ids), "attention_mask": [1] * len(labels), "labels": labels})
    collator: Any = transformers.DataCollatorForSeq2Seq(
        tokenizer, pad_to_multiple_of=None if setting.response_only else 8, return_tensors="pt", padding=True
    )
    consumed: list[tuple[int, ...]] = []
    collator = Recorder(collator, consumed)
    trainer = transformers.Trainer(
        model=peft,
        args=arguments(setting, folder),
        train_dataset=rows,
        data_collator=collator,  # type: ignore[arg-type]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    outcome.work += collator.work
    return consumed


def arguments(setting: Setting, folder: str) -> transformers.TrainingArguments:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a new name for checkpointing
        return transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=setting.batch // setting.micro_batch,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            train_sampling_strategy="group_by_length" if setting.group_by_length else "random",
            gradient_checkpointing=setting.checkpointing,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
        )
