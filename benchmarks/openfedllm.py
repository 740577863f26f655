"""OpenFedLLM: its `main_sft.py` executed as it is, with its own configuration, sampling and averaging.

It needs `DataCollatorForCompletionOnlyLM` and an `SFTTrainer` with arguments that trl dropped after 0.9, and
trl 0.9 does not run with current transformers. So a substitute `trl` does what 0.9 did with these arguments:
it formats and tokenizes the data set, labels the tokens after the response's template, and hands the rest to
transformers' Trainer. The starting adapter and a LoRA dropout of zero are also set from outside.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers

from benchmarks import peers
from benchmarks.contest import Stopwatch
from benchmarks.rounds import LEARNING_RATE, Outcome, Recorder, Setting
from benchmarks.workload import CUTOFF, Example, put
from fedloom.state import AdapterState

NAME = "OpenFedLLM"
COMMIT = "14c6af2"
URL = "https://github.com/rui-ye/OpenFedLLM"


class CompletionOnly:
    """trl 0.9's collator: labels begin right after the last occurrence of the template."""

    def __init__(self, template: Sequence[int], tokenizer: Any):
        self.template = list(template)
        self.tokenizer = tokenizer

    def __call__(self, features: Sequence[Any]) -> Any:
        batch = self.tokenizer.pad(features, return_tensors="pt")
        ids, width = batch["input_ids"], len(self.template)
        labels = torch.full_like(ids, -100)
        for row in range(len(ids)):
            words = ids[row].tolist()
            found = [i for i in range(len(words)) if words[i : i + width] == self.template]
            if found:
                labels[row, found[-1] + width :] = ids[row, found[-1] + width :]
        batch["labels"] = labels.masked_fill(ids == self.tokenizer.pad_token_id, -100)
        return batch


def trl(recorders: list[Recorder]) -> Any:
    """A module with the three names that OpenFedLLM imports."""

    class SFTTrainer(transformers.Trainer):
        def __init__(
            self,
            *,
            model: Any,
            tokenizer: Any,
            args: Any,
            max_seq_length: int,
            train_dataset: Any,
            formatting_func: Any,
            data_collator: Any,
        ):
            def tokenize(rows: Any) -> dict[str, Any]:
                said = tokenizer(formatting_func(rows), truncation=True, max_length=max_seq_length)
                return {"input_ids": said["input_ids"], "attention_mask": said["attention_mask"]}

            rows = train_dataset.map(tokenize, batched=True, remove_columns=train_dataset.column_names)
            recorders.append(Recorder(data_collator, []))
            super().__init__(model=model, args=args, train_dataset=rows, data_collator=recorders[-1])
            self.remove_callback(transformers.PrinterCallback)

    def collator(template: Sequence[int], tokenizer: Any) -> CompletionOnly:
        return CompletionOnly(template, tokenizer)

    return peers.blank(
        "trl",
        SFTTrainer=SFTTrainer,
        DPOTrainer=type("DPOTrainer", (), {}),
        DataCollatorForCompletionOnlyLM=collator,
    )


def run(
    clone: Path,
    model: Any,
    setting: Setting,
    start: AdapterState,
    data: Sequence[Sequence[Example]],
    tokenizer: Any,
) -> Outcome:
    """The rounds of `setting`, from `start`. The clock starts when its model has an adapter."""
    datasets = peers.needed("datasets", NAME)
    transformers.utils.logging.disable_progress_bar()
    outcome = Outcome(start, Stopwatch())
    recorders: list[Recorder] = []
    with_adapter, lora, train_with = peft.get_peft_model, peft.LoraConfig, transformers.TrainingArguments
    running = outcome.watch.running()

    def begin(model: Any, config: Any) -> Any:
        made = with_adapter(model, config)
        put(made, start)
        running.__enter__()
        return made

    def arguments(**options: Any) -> Any:
        return train_with(**options, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True)

    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base"), Path(folder, "out")
        out.mkdir()
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        _write(data, Path(folder, "data", "vicgalle", "alpaca-gpt4"))
        words = {
            "model_name_or_path": base,
            "output_dir": out,
            "local_data_dir": f"{folder}/data/",
            "dataset_name": "vicgalle/alpaca-gpt4",
            "template": "alpaca",
            "use_peft": True,
            "learning_rate": LEARNING_RATE,
            "batch_size": setting.batch,
            "seq_length": CUTOFF,
            "max_steps": setting.steps,
            "peft_lora_r": setting.lora.rank,
            "peft_lora_alpha": int(setting.lora.alpha),
            "gradient_checkpointing": setting.checkpointing,
            "num_rounds": setting.rounds,
            "num_clients": setting.clients,
            "sample_clients": setting.per_round,
            "save_model_freq": setting.rounds + 1,
        }
        with (
            peers.at_home(clone, {"trl": trl(recorders)}),
            patch.object(peft, "get_peft_model", begin),
            patch.object(peft, "LoraConfig", lambda **options: lora(**{**options, "lora_dropout": 0.0})),
            patch.object(transformers, "TrainingArguments", arguments),
            patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache")),
            patch.object(
                sys, "argv", ["main_sft.py", *(str(w) for k, v in words.items() for w in (f"--{k}", v))]
            ),
        ):
            datasets.disable_progress_bars()
            left = runpy.run_path("main_sft.py", run_name="__main__")
            running.__exit__(None, None, None)
    outcome.adapter = AdapterState({name: t.detach().clone() for name, t in left["global_dict"].items()})
    sizes = left["sample_num_list"]
    for number in range(setting.rounds):
        cohort = left["get_clients_this_round"](left["fed_args"], number)
        mine = recorders[number * setting.per_round : (number + 1) * setting.per_round]
        outcome.consumed.append([recorder.consumed for recorder in mine])
        outcome.shares.append([sizes[c] / sum(sizes[c] for c in cohort) for c in cohort])
    for recorder in recorders:
        outcome.work += recorder.work
    return outcome


def _write(data: Sequence[Sequence[Example]], folder: Path) -> None:
    """All examples in one file: OpenFedLLM distributes them to clients itself."""
    folder.mkdir(parents=True)
    rows = [
        {"instruction": e.instruction, "input": e.context, "output": e.response, "text": ""}
        for d in data
        for e in d
    ]
    (folder / "train.json").write_text(json.dumps(rows))
