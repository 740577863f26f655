"""From settings to the machine that trains: base model, tokenizer, prompt format and engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.data.template import Template
from fedloom.errors import ConfigError
from fedloom.experiment.settings import Experiment
from fedloom.experiment.settings import Machine as Settings

if TYPE_CHECKING:  # settings and data are read without waiting for torch
    from fedloom.engine.lora_engine import Generation, LoraEngine


def load_template(experiment: Experiment, model: Any, tokenizer: Any) -> Template:
    """The prompt format, with what this base model reads; one without weights does, too."""
    from fedloom.engine.generation import positions

    p, most = experiment.prompt, positions(model) or sys.maxsize
    return Template(
        tokenizer,
        format=p.format,
        max_length=p.max_length,
        positions=most,
        loss_on=p.loss_on,
        system=p.system,
    )


@dataclass(frozen=True)
class Skeleton:
    """A base model without its weights: enough to check an experiment, and to count."""

    model: Any  # on the meta device
    template: Template
    tokenizer: Any

    @property
    def positions(self) -> int:
        return self.template.positions

    @property
    def vocabulary(self) -> int:
        """Tokens that the base model embeds."""
        return int(self.model.get_input_embeddings().num_embeddings)


def load_skeleton(experiment: Experiment) -> Skeleton:
    from fedloom.engine import models

    m = experiment.model
    model, tokenizer = models.skeleton(m.base, allow_download=m.allow_download)
    return Skeleton(model, load_template(experiment, model, tokenizer), tokenizer)


@dataclass(frozen=True)
class Machine:
    """The one thing that touches a device: base model, tokenizer, prompt format and engine."""

    engine: LoraEngine
    template: Template
    tokenizer: Any
    base_hash: str  # of the weights as they are computed with, which answers depend on
    base_sha256: str  # of the weights as they are stored: what the base is, in every dtype
    end_reachable: bool = True  # can the frozen output head say the token that ends an answer?

    @property
    def positions(self) -> int:
        """Tokens that the base model reads; many, where nothing limits it."""
        return self.template.positions

    def is_base(self, sha256: str) -> bool:
        """Is this the base that was recorded so? Version 0.1.0 recorded the weights as it computed with them."""
        return sha256 in (self.base_sha256, self.base_hash)

    def describe(self) -> dict[str, Any]:
        """How it computes: for the record, and for whoever wonders about the speed."""
        return {
            "path": self.engine.path,
            "reason": self.engine.path_reason,
            "decoding_reason": self.engine.decoding_reason,
            "base_sha256": self.base_sha256,
            "trained_parameters": self.engine.layout.size,
            "format": self.template.format,
            "end": self.template.end_text,
            "end_reachable": self.end_reachable,
            "conv1d": any(t.kind == "conv1d" for t in self.engine.layout),
        }


def load_machine(experiment: Experiment) -> Machine:
    from fedloom.engine import models
    from fedloom.engine.head import reachable
    from fedloom.engine.lora_engine import LoraEngine

    m, machine = experiment.model, experiment.machine
    model, tokenizer = load_base(experiment)
    template = load_template(experiment, model, tokenizer)
    base_hash, base_sha256 = models.base_hash(model), models.identity(m.base, allow_download=m.allow_download)
    end_reachable = reachable(model, template.end)
    engine = LoraEngine.build(
        model,
        template.encode,
        lora=experiment.adapter,
        tokens_per_pass=machine.tokens_per_pass,
        path=machine.kernels,
        checkpointing=machine.checkpointing,
        generation=_generation(machine, base=m.base, allow_download=m.allow_download),
    )
    return Machine(engine, template, tokenizer, base_hash, base_sha256, end_reachable)


def _generation(machine: Settings, *, base: str, allow_download: bool) -> Generation:
    from fedloom.engine import models
    from fedloom.engine.generation import generate_all
    from fedloom.engine.vllm_backend import VllmGeneration

    if machine.vllm is None:
        return generate_all
    folder = models.base_folder(base, allow_download=allow_download)
    if folder is None:
        raise ConfigError(f"machine.vllm needs a model that is on disk; got model.base={base!r}.")
    return VllmGeneration(folder, **machine.vllm.model_dump(exclude_none=True))


def load_base(experiment: Experiment) -> tuple[Any, Any]:
    from fedloom.engine import models

    m = experiment.model
    return models.load_base(
        m.base,
        dtype=m.dtype,
        device=experiment.machine.device,
        quantize=None if m.quantize == "none" else m.quantize,
        allow_download=m.allow_download,
    )
