"""Shepherd (FedIT), as published: `main.fl_finetune` with its own client, trainer settings and averaging.

Set from outside: a random model and a word tokenizer in place of LLaMA in 8 bits (hence no checkpointing,
which its 8-bit preparation would switch on); no 16-bit autocast on a CPU; arguments under their new names;
the starting adapter; and loading that works (`load` below: without it, under PEFT 0.21, every client silently
continues from the previous one and the average is never loaded). Two settings are ours, for equal results:
the learning rate is constant within a round instead of falling to zero, and first tokens do not count towards
the loss.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers

from benchmarks import peers
from benchmarks.contest import Stopwatch
from benchmarks.rounds import LEARNING_RATE, Outcome, Recorder, Setting
from benchmarks.workload import CUTOFF, Example, adapter_of, put
from fedloom.state import AdapterState

NAME = "Shepherd"
COMMIT = "bcffa00"
URL = "https://github.com/JayZhang42/FederatedGPT-Shepherd"


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
    outcome = Outcome(start, Stopwatch())
    recorders: list[Recorder] = []
    collate, train_with = transformers.DataCollatorForSeq2Seq, transformers.TrainingArguments

    def collator(*args: Any, **options: Any) -> Recorder:
        recorders.append(Recorder(collate(*args, **options), []))
        return recorders[-1]

    def arguments(*, group_by_length: bool, evaluation_strategy: str, **options: Any) -> Any:
        options |= {"fp16": False, "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
        options |= {"eval_strategy": evaluation_strategy, "lr_scheduler_type": "constant"}
        options |= {"train_sampling_strategy": "group_by_length" if group_by_length else "random"}
        return train_with(**options)

    load_adapter = peft.set_peft_model_state_dict

    def load(model: Any, *state: Any) -> Any:
        """Load past Shepherd's replacement for `model.state_dict`, where PEFT now looks for names to load."""
        theirs = vars(model).pop("state_dict", None)
        result = load_adapter(model, *state)
        if theirs is not None:
            model.state_dict = theirs
        return result

    stand_ins = {"fire": peers.blank("fire", Fire=None)}
    with tempfile.TemporaryDirectory() as folder, peers.at_home(clone, stand_ins):
        _write(data, Path(folder, "data", str(setting.clients)))
        with (
            patch("peft.prepare_model_for_int8_training", lambda model: model, create=True),
            patch.object(peft, "set_peft_model_state_dict", load),
            patch.object(transformers, "DataCollatorForSeq2Seq", collator),
            patch.object(transformers, "TrainingArguments", arguments),
            patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache")),
            patch.object(datasets.config, "HF_DATASETS_OFFLINE", True),
        ):
            datasets.disable_progress_bars()
            main: Any = importlib.import_module("main")
            with_adapter, made, running = main.get_peft_model, [], outcome.watch.running()

            def begin(*args: Any) -> Any:
                made.append(with_adapter(*args))
                put(made[0], start)
                running.__enter__()
                return made[0]

            main.get_peft_model = begin
            main.LlamaForCausalLM = SimpleNamespace(from_pretrained=lambda *_, **__: model)
            main.LlamaTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
            main.tqdm = lambda rounds: rounds
            main.fl_finetune(
                global_model="random",
                data_path=str(Path(folder, "data")),
                output_dir=str(Path(folder, "out")),
                client_selection_frac=setting.per_round / setting.clients,
                num_communication_rounds=setting.rounds,
                num_clients=setting.clients,
                local_batch_size=setting.batch,
                local_micro_batch_size=setting.micro_batch,
                local_num_epochs=1,
                local_learning_rate=LEARNING_RATE,
                cutoff_len=CUTOFF,
                lora_r=setting.lora.rank,
                lora_alpha=int(setting.lora.alpha),
                lora_dropout=0.0,
                lora_target_modules=list(setting.targets),
                group_by_length=setting.group_by_length,
            )
            running.__exit__(None, None, None)
    del made[0].state_dict  # which Shepherd has replaced
    outcome.adapter = adapter_of(made[0])
    for number in range(setting.rounds):
        mine = recorders[number * setting.per_round : (number + 1) * setting.per_round]
        outcome.consumed.append([recorder.consumed for recorder in mine])
        # as in its FedAvg: normalised in float32, whatever the model's precision
        counts = torch.tensor([len(recorder.consumed) for recorder in mine], dtype=torch.float32)
        outcome.shares.append(torch.nn.functional.normalize(counts, p=1, dim=0).tolist())
    for recorder in recorders:
        outcome.work += recorder.work
    return outcome


def _write(data: Sequence[Sequence[Example]], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, examples in enumerate(data):
        rows = [
            {"instruction": e.instruction, "context": e.context, "response": e.response} for e in examples
        ]
        (folder / f"local_training_{number}.json").write_text(json.dumps(rows))
