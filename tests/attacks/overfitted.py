"""The embedded base, and an adapter trained on six access codes until it knows them by heart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fedloom.data.example import Example
from fedloom.data.microworld import private_facts
from fedloom.data.template import Template
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.models import load_base
from fedloom.state import AdapterState
from fedloom.steps import Fit, LocalTraining, LoraSpec


@dataclass(frozen=True)
class Overfitted:
    engine: LoraEngine
    template: Template
    adapters: dict[str, AdapterState | None]  # "overfitted", and "untrained", which is fresh
    members: list[Example]
    held_out: list[Example]  # facts of the same kind that nobody was trained on


@cache
def overfitted() -> Overfitted:
    model, tokenizer = load_base("embedded")
    template = Template(tokenizer, format="plain")
    local = LocalTraining(epochs=30, batch_size=6, learning_rate=1e-2)
    engine = LoraEngine.build(model, template.encode, lora=LoraSpec(rank=8, alpha=16.0))
    members, held_out = private_facts("trained", 6), private_facts("held out", 6)
    start = engine.initial_adapter(0)
    fitted = engine.answer({0: Fit(start, members, local, stream=("overfit",))})[0]
    return Overfitted(engine, template, {"overfitted": fitted.adapter, "untrained": start}, members, held_out)
