"""What an experiment will need, worked out from shapes and settings; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from fedloom import rng
from fedloom.config import Experiment
from fedloom.engine import models
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import DataError
from fedloom.experiment import load_data, load_template
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.codec import Codec
from fedloom.transport.downlink import Downlink


@dataclass(frozen=True)
class Plan:
    base_parameters: int
    adapter_parameters: int
    targets: int  # adapted layers
    bytes_up: int  # of one client in one round, on average; where a codec uses zstd, for normally distributed deltas
    bytes_down: int
    rounds: int
    cohort: float  # clients in a round, on average
    width: int
    tokens_per_pass: int
    memory: float  # bytes, an estimate
    data: list[str]
    notes: Sequence[str] = ()  # what the data's reader has to say


def plan(experiment: Experiment) -> Plan:
    model, tokenizer = models.skeleton(experiment.model.base, allow_download=experiment.model.allow_download)
    layout = AdapterLayout.of(model, experiment.adapter)
    adapter = layout.initial(experiment.seed)
    codec: Codec = experiment.transport.codec.build()
    noise = rng.stream(experiment.seed, "plan")
    delta = adapter.map(lambda t: 1e-3 * torch.randn(t.shape, generator=noise, dtype=t.dtype))
    up = len(wire.pack_update(Update("client-000", {"delta": delta}, 1.0, {"loss": 0.0, "steps": 0, "tokens": 0}), codec))
    base = models.count_parameters(model)
    notes: Sequence[str] = ()
    try:
        dataset = load_data(experiment)
        notes = dataset.notes
        template = load_template(experiment, tokenizer)
        examples = [e for own in dataset.clients.values() for e in own]
        sample = examples[:: max(1, len(examples) // 2000)]
        data = [
            f"{len(examples):,} training examples with {len(dataset.clients)} clients, {len(dataset.test):,} held out",
            f"in {len(sample):,} of them: " + ", ".join(f"{k.replace('_', ' ')} {v:,.4g}" for k, v in template.measure(sample).items() if k != "examples"),
        ]
        clients = sorted(dataset.clients)
    except (DataError, OSError) as unread:
        data, clients = [f"not read: {unread}"], [f"client-{i:03d}" for i in range(experiment.data.clients or 1)]
    select = experiment.cohort.build(clients=clients, seed=experiment.seed)
    cohorts = [select(r) for r in range(experiment.rounds)]
    cohort, down = fmean(map(len, cohorts)), _bytes_down(adapter, delta, codec, cohorts)
    width = min(experiment.transport.width, max(1, round(cohort)))
    return Plan(
        base, layout.size, len(layout.targets), up, down, experiment.rounds, cohort, width,
        experiment.model.tokens_per_pass, _memory(experiment, model, base, layout.size, width), data, notes,
    )  # fmt: skip


def _bytes_down(adapter: AdapterState, delta: AdapterState, codec: Codec, cohorts: Sequence[Sequence[ClientId]]) -> int:
    """To a client in a round, on average: less where it was there not long before."""
    message = Broadcast(0, {"adapter": adapter})
    if not codec.label:
        return len(wire.pack_broadcast(message))
    link = Downlink(codec)
    while not link.first and link.newest < len(cohorts):  # until the first version is forgotten
        adapter = adapter + delta
        link.publish(adapter)
    whole = len(link.pack(message, None))
    missed = [len(link.pack(message, version)) for version in range(link.newest, link.first - 1, -1)]
    seen: dict[ClientId, int] = {}
    sizes = []
    for now, cohort in enumerate(c for c in cohorts if c):
        gaps = [now - seen[c] if c in seen else len(missed) for c in cohort]
        sizes += [missed[gap] if gap < len(missed) else whole for gap in gaps]
        seen.update(dict.fromkeys(cohort, now))
    return round(fmean(sizes)) if sizes else whole


def _memory(experiment: Experiment, model: Any, base: int, adapter: int, width: int) -> float:
    """The runtime, weights, for each client parameters with gradient and moments, activations;
    for examples of full length, within a factor of 2.

    Activations of a token in a layer: the inputs of its linear maps, norms and activations (about 24 times the
    hidden size and 6 times the intermediate one) and two attention weights a head and token it may see; a
    quarter of that with checkpointing. Half as much again for what the allocator cannot reuse, which is what
    a run of examples up to 512 tokens on the embedded model was measured to take.
    """
    m, config = experiment.model, model.config.get_text_config()
    weight = {"8bit": 1.0, "4bit": 0.56}.get(m.quantize, 2.0 if m.dtype == "bfloat16" else 4.0)  # bytes
    number = 2 if m.dtype == "bfloat16" else 4
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    a_token = 24 * config.hidden_size + 6 * wide + 2 * config.num_attention_heads * experiment.prompt.max_length
    activations = 1.5 * m.tokens_per_pass * config.num_hidden_layers * a_token * number / (4 if m.checkpointing else 1)
    return RUNTIME + base * weight + width * adapter * 16 + activations


RUNTIME = 0.5e9  # Python, torch and transformers, before any model
