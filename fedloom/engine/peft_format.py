"""Adapters on disk in PEFT's format, and a base model with an adapter merged in.

`peft.PeftModel.from_pretrained` and servers that load PEFT adapters read these files. Files we read are never handed
to PEFT, since a configuration can name code to import and files to fetch: the few fields that matter are copied one by
one, and anything else that would change the adapter's meaning is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging as remarks

from fedloom import lora
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import LoraSpec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Fields that describe where an adapter came from, or how it was started; they do not change what it computes.
_REMARKS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


def save_adapter(
    folder: str | Path,
    state: AdapterState,
    spec: LoraSpec,
    *,
    base_name: str,
    card: str,
    fan_in_fan_out: bool = False,
) -> None:
    """Write weights, configuration and model card, each whole or not at all, the weights first.

    The targets are written as the full list of module names, so that nothing depends on how a reader
    spells out "all-linear". `card` is Markdown. `fan_in_fan_out` is for models made of `Conv1D` (GPT-2);
    without it PEFT notices and warns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "target_modules": sorted(_factors(state, spec.rank, where=str(folder))),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.rslora,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    replace_file(folder / "README.md", (card.strip() + "\n").encode())


def load_adapter(folder: str | Path) -> tuple[AdapterState, LoraSpec]:
    """Read an adapter written here or by PEFT; `targets` of the spec are the modules the file holds.

    Raises ModelError for files that are damaged, incomplete, not plain LoRA, or a pickle.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = (
            " Its adapter_model.bin is a pickle, which can run code when read."
            * (folder / "adapter_model.bin").exists()
        )
        raise ModelError(f"{folder} has no {WEIGHTS}.{pickled}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            state = AdapterState({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged or cut short; copy it again.") from error
    rank = config["r"]
    modules = _factors(state, rank, where=str(folder / WEIGHTS))
    wanted = config["target_modules"]
    if isinstance(wanted, list):
        stray = [m for m in modules if not any(m == end or m.endswith(f".{end}") for end in wanted)]
        if stray:
            raise ModelError(f"{folder}: {stray[0]!r} has weights and is not among the target_modules.")
    spec = LoraSpec(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=tuple(modules),
        rslora=bool(config.get("use_rslora", False)),
    )
    return state, spec


def export_merged(
    model: Any,
    tokenizer: Any,
    state: AdapterState,
    layout: AdapterLayout,
    folder: str | Path,
    *,
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the base with the adapter added into its weights: a plain transformers folder, no LoRA left.

    `model` may have LoRA layers in place and is not changed. In bfloat16 the sum is rounded once more
    than it is during training. The folder appears when it is complete; it must not exist before.
    `beside` writes further files into it, over those that stem from the base.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty; choose a new folder for the merged model.")
    if opaque := [target.name for target in layout if target.kind == "opaque"]:
        raise ModelError(
            f"{opaque[0]!r} is quantised and nothing can be added to it; load the base without quantize to export it."
        )
    vector = layout.to_vector(state)
    merged = {_outer(name, layout): tensor for name, tensor in model.state_dict().items()}
    for target in layout:
        name = f"{target.name}.weight"
        weight = merged[name]
        update = layout.spec.scale * (target.b(vector).double() @ target.a(vector).double())  # (out, in)
        update = update if target.kind == "linear" else update.t()
        merged[name] = (weight.double().cpu() + update).to(weight)
    with torch.device("meta"):
        plain = type(model)(deepcopy(model.config))
    plain.load_state_dict(merged, assign=True)
    plain.tie_weights()
    plain.generation_config = deepcopy(model.generation_config)

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    bars = remarks.is_progress_bar_enabled()
    remarks.disable_progress_bar()
    try:
        plain.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        beside(draft)
        for file in draft.iterdir():
            file.chmod(0o644)  # some come out private to the user
        draft.chmod(0o755)
        draft.replace(folder)
    finally:
        if bars:
            remarks.enable_progress_bar()
        rmtree(draft, ignore_errors=True)


def _factors(state: AdapterState, rank: int, *, where: str) -> list[str]:
    """The modules that `state` adapts, each with both factors of this rank."""
    modules: dict[str, set[lora.Side]] = {}
    for name, tensor in state.items():
        found = lora.parse(name)
        if found is None or not name.startswith(lora.ON_DISK):
            raise ModelError(f"{where}: {name!r} is not a LoRA factor of a linear module.")
        target, side = found
        width = tensor.shape[0 if side == "A" else -1] if tensor.dim() == 2 else None
        if width != rank:
            raise ModelError(f"{where}: {name!r} has shape {tuple(tensor.shape)}, not rank {rank}.")
        modules.setdefault(target.removeprefix(lora.ON_DISK), set()).add(side)
    if lonely := [module for module, sides in modules.items() if sides != {"A", "B"}]:
        raise ModelError(f"{where}: {lonely[0]!r} has one LoRA factor of two.")
    if not modules:
        raise ModelError(f"{where}: the adapter is empty.")
    return list(modules)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"{file.parent} is no adapter: it has no {CONFIG}.")
    try:
        said = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not readable JSON; copy the adapter again.") from error
    if not isinstance(said, dict):
        raise ModelError(f"{file} is not a JSON object.")
    for name, valid in _MEANT.items():
        if name in said and not valid(said[name]):
            raise ModelError(
                f"{file}: {name} = {said[name]!r} is not supported; expected a plain LoRA adapter."
            )
        if name not in said and name in ("peft_type", "r", "lora_alpha", "target_modules"):
            raise ModelError(f"{file} does not say {name}.")
    for name in sorted(said.keys() - _MEANT.keys() - _REMARKS):
        if said[name]:  # switched off, or empty
            raise ModelError(
                f"{file}: {name} is set, which changes what the adapter computes in a way fedloom does not know."
            )
    return {name: said[name] for name in _MEANT if name in said}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Fields that are copied, and their valid values.
_MEANT: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    "r": lambda value: _number(value) and value == int(value) and value > 0,
    "lora_alpha": lambda value: _number(value) and value > 0,
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "use_rslora": lambda value: isinstance(value, bool),
    "bias": lambda value: value == "none",
    "init_lora_weights": lambda value: value in (True, False, "gaussian"),  # others change the base model
    "target_modules": lambda value: (
        isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    ),
}


def _outer(name: str, layout: AdapterLayout) -> str:
    """The name a tensor has without LoRA layers around its module."""
    module, _, inner = name.rpartition(".base.")
    return f"{module}.{inner}" if any(target.name == module for target in layout) else name


def replace_file(file: Path, data: bytes) -> None:
    """Whole or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    with draft.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
