"""From plain values to a base model and the engine around it, in this process or another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedloom.errors import ConfigError
from fedloom.steps import LoraSpec, Tokens

if TYPE_CHECKING:  # a process that only sends a setup to workers need not wait for peft
    from fedloom.engine.lora_engine import LoraEngine
    from fedloom.engine.models import Device, DType, Quantize
    from fedloom.engine.serving import Generation


@dataclass(frozen=True)
class Setup:
    """Everything that determines an engine's answers."""

    base: str = "embedded"  # a name that `models.load_base` knows
    dtype: DType = "auto"
    device: Device = "auto"
    quantize: Quantize | None = None
    allow_download: bool = False
    lora: LoraSpec = field(default_factory=LoraSpec)
    tokens_per_pass: int = 4096
    kernels: Literal["auto", "fast", "reference"] = "auto"
    checkpointing: bool = False
    vllm: Mapping[str, Any] | None = None  # options of `VllmGeneration`; None: the engine's own generation
    end: int = 0  # the token that ends an answer


@dataclass(frozen=True)
class Facts:
    """Facts that only a process with the weights can report."""

    base_hash: str  # hash of the weights in computing precision, on which answers depend
    base_sha256: str  # hash of the weights as stored: identifies the base whatever the dtype
    path: str  # "fast" or "reference"
    reason: str  # why not "fast"; else empty
    decoding_reason: str  # why answers use the model's own cache and attention; else empty
    end_reachable: bool  # can the frozen output head produce the token that ends an answer?


def load(setup: Setup, encode: Callable[[Any], Tokens]) -> tuple[LoraEngine, Facts]:
    """The engine; its examples are whatever `encode` accepts. Raises ConfigError, ModelError."""
    from fedloom.engine import models
    from fedloom.engine.head import reachable
    from fedloom.engine.lora_engine import LoraEngine

    model, _ = models.load_base(
        setup.base,
        dtype=setup.dtype,
        device=setup.device,
        quantize=setup.quantize,
        allow_download=setup.allow_download,
    )
    base_hash = models.base_hash(model)
    end_reachable = reachable(model, setup.end)
    generation, close = _generation(setup)
    engine = LoraEngine.build(
        model,
        encode,
        lora=setup.lora,
        tokens_per_pass=setup.tokens_per_pass,
        path=setup.kernels,
        checkpointing=setup.checkpointing,
        generation=generation,
        close=close,
    )
    stored = models.identity(setup.base, allow_download=setup.allow_download)
    facts = Facts(base_hash, stored, engine.path, engine.path_reason, engine.decoding_reason, end_reachable)
    return engine, facts


def _generation(setup: Setup) -> tuple[Generation, Callable[[], None]]:
    """What answers, and what ends it."""
    from fedloom.engine import models
    from fedloom.engine.generation import generate_all
    from fedloom.engine.vllm_backend import VllmGeneration

    if setup.vllm is None:
        return generate_all, lambda: None
    folder = models.base_folder(setup.base, allow_download=setup.allow_download)
    if folder is None:
        raise ConfigError(f"machine.vllm needs a model that is on disk; got model.base={setup.base!r}.")
    vllm = VllmGeneration(folder, **setup.vllm)
    return vllm, vllm.close
