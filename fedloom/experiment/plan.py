"""Estimate an experiment's needs from shapes and settings, without loading weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from fedloom import rng
from fedloom.engine import models
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import ConfigError, FedloomError
from fedloom.experiment import machine, preflight, questions
from fedloom.experiment.build import cohorts
from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import load_skeleton
from fedloom.experiment.settings import Experiment
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.state import AdapterState
from fedloom.statistics import evenly
from fedloom.transport import wire
from fedloom.transport.codec import Codec
from fedloom.transport.downlink import Downlink


@dataclass(frozen=True)
class Plan:
    base_parameters: int
    adapter_parameters: int
    targets: int  # adapted layers
    bytes_up: int  # of one client in a round, on average; with zstd, for normally distributed deltas
    bytes_down: int
    rounds: int
    cohort: float  # clients in a round, on average
    width: int  # clients in one batch
    batches: int  # of the largest round
    workers: int  # that share the groups out
    threads: int  # of each worker
    cores: int  # of this machine
    tokens_per_pass: int
    memory: float  # bytes, an estimate
    disk: int  # bytes at most, roughly, of a run's rounds and adapter; 0 where the data could not be read
    data: list[str]
    notes: Sequence[str]  # notes from the data's reader
    problem: str | None  # problems that would end a run, sooner or later


def plan(experiment: Experiment) -> Plan:
    skeleton = load_skeleton(experiment)
    model, template = skeleton.model, skeleton.template
    layout = AdapterLayout.of(model, experiment.adapter)
    adapter = layout.initial(experiment.seed)
    codec = experiment.transport.codec
    noise = rng.numpy_stream(experiment.seed, "plan")
    delta = adapter.map(lambda t: 1e-3 * torch.from_numpy(noise.standard_normal(t.shape)).to(t.dtype))
    up = len(
        wire.pack_update(
            Update("client-000", {"delta": delta}, 1.0, {"loss": 0.0, "steps": 0, "tokens": 0}),
            codec,
            experiment=NAMED,
        )
    )
    base = models.count_parameters(model)
    data, clients, disk, problem = (
        list[str](),
        [f"client-{i:03d}" for i in range(experiment.data.clients or 1)],
        0,
        None,
    )
    notes: Sequence[str] = ()
    try:
        dataset = load_data(experiment)
        notes = dataset.notes
        examples = [e for own in dataset.clients.values() for e in own]
        sample = evenly(examples, 2000)
        data = [
            f"{len(examples):,} training examples with {len(dataset.clients)} clients, {len(dataset.test):,} held out",
            f"in {len(sample):,} of them: "
            + ", ".join(
                f"{k.replace('_', ' ')} {v:,.4g}"
                for k, v in template.measure(sample).items()
                if k != "examples"
            ),
        ]
        room = experiment.evaluation.max_new_tokens
        if cut := sum(template.prompt_cut(e, room=room) != "none" for e in dataset.test):
            data.append(
                f"{cut:,} held-out prompts are cut: the base model reads {template.positions:,} tokens, {room:,} of them for an answer"
            )
        clients = sorted(dataset.clients)
        disk = preflight.disk(experiment, dataset, layout.size, compared=False)
        preflight.check(experiment, [dataset], skeleton)
        questions.check(experiment, dataset)
    except (FedloomError, OSError) as found:
        problem = str(found)
    cohorts = _cohorts(experiment, clients)
    cohort, down = fmean(map(len, cohorts)), _bytes_down(adapter, delta, codec, cohorts)
    width = min(experiment.machine.clients_per_batch, max(1, round(cohort)))
    batches = max(1, math.ceil(max(map(len, cohorts)) / experiment.machine.clients_per_batch))
    workers = machine.workers(experiment, batches=batches)
    return Plan(
        base,
        layout.size,
        len(layout.targets),
        up,
        down,
        experiment.rounds,
        cohort,
        width,
        batches,
        workers,
        machine.threads_of(experiment, base, workers=workers),
        machine.cores(),
        experiment.machine.tokens_per_pass,
        _memory(experiment, model, base, layout.size, width, workers),
        disk,
        data,
        notes,
        problem,
    )


def _cohorts(experiment: Experiment, clients: Sequence[ClientId]) -> list[Sequence[ClientId]]:
    try:
        select = cohorts(experiment, clients)
        return [select(r) for r in range(experiment.rounds)]
    except ConfigError:  # more than there are: a problem reported elsewhere, counted here with all clients
        return [clients] * experiment.rounds


def _bytes_down(
    adapter: AdapterState, delta: AdapterState, codec: Codec, cohorts: Sequence[Sequence[ClientId]]
) -> int:
    """Bytes to a client in a round, on average: fewer where it took part recently."""
    message = Broadcast(0, {"adapter": adapter})
    if not codec.label:
        return len(wire.pack_broadcast(message, experiment=NAMED))
    link = Downlink(codec)
    while not link.first and link.newest < len(cohorts):  # rounds until the first version is forgotten
        adapter = adapter + delta
        link.publish(adapter)
    whole = len(link.pack(message, None, experiment=NAMED))
    missed = [
        len(link.pack(message, version, experiment=NAMED))
        for version in range(link.newest, link.first - 1, -1)
    ]
    seen: dict[ClientId, int] = {}
    sizes = []
    for now, cohort in enumerate(c for c in cohorts if c):
        gaps = [now - seen[c] if c in seen else len(missed) for c in cohort]
        sizes += [missed[gap] if gap < len(missed) else whole for gap in gaps]
        seen.update(dict.fromkeys(cohort, now))
    return round(fmean(sizes)) if sizes else whole


def _memory(experiment: Experiment, model: Any, base: int, adapter: int, width: int, workers: int) -> float:
    """Bytes of the runtime, the weights, and each worker's parameters, gradients, moments and activations.

    For examples of full length, within a factor of 2. Activations of one token in one layer: the inputs of
    its linear maps, norms and activation functions (about 24 times the hidden size and 6 times the
    intermediate one), and two attention weights for each head and each token it may see; a quarter of that
    with checkpointing. Half as much again covers what the allocator cannot reuse: that was measured for
    examples of up to 512 tokens on the embedded model.
    """
    m, machine, config = experiment.model, experiment.machine, model.config.get_text_config()
    weight = {"8bit": 1.0, "4bit": 0.56}.get(m.quantize, 2.0 if m.dtype == "bfloat16" else 4.0)  # bytes
    number = 2 if m.dtype == "bfloat16" else 4
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    a_token = (
        24 * config.hidden_size + 6 * wide + 2 * config.num_attention_heads * experiment.prompt.max_length
    )
    activations: float = (
        1.5
        * machine.tokens_per_pass
        * config.num_hidden_layers
        * a_token
        * number
        / (4 if machine.checkpointing else 1)
    )
    return RUNTIME + base * weight + workers * (width * adapter * 16 + activations)


NAMED = "0" * 16  # as long as the experiment's name in messages
RUNTIME = 0.5e9  # Python, torch and transformers, before any model
