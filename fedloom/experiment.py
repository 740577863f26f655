"""From an experiment's settings to the objects that run: data, engine, clients, federation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.config import PARTS, Choice, Clusters, Experiment, Model
from fedloom.data import microworld, partition, sources
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.engine import models
from fedloom.engine.embedding import embed
from fedloom.engine.generation import generate_all, positions
from fedloom.engine.lora_engine import Generation, LoraEngine
from fedloom.engine.vllm_backend import VllmGeneration
from fedloom.errors import ConfigError
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.pseudo_labels import PseudoLabels

MICROWORLD = 640  # examples, where data.examples does not say
CONTEXT_LENGTH = 2048  # tokens of a prompt for synthesis and its answer, at most


@dataclass(frozen=True)
class Dataset:
    """Who holds what, and what nobody trains on."""

    clients: Mapping[ClientId, Sequence[Example]]
    test: Sequence[Example]
    table: partition.PartitionTable  # of the training examples
    by: partition.Label  # what the held-out examples are grouped by: category, or owner
    read: Mapping[str, Any] = field(default_factory=dict)  # what the reader reported
    spare: Sequence[Example] = ()  # what data.pool left over: neither trained on nor tested on

    def mix(self, client: ClientId) -> Mapping[str, float]:
        """The shares of this client's training examples over the groups of the held-out set."""
        groups = [_group(e, self.by) for e in self.clients[client]]
        return {g: groups.count(g) / len(groups) for g in sorted(set(groups))}

    def sha256(self) -> str:
        """Of every example, who holds it and which are held out: other data have another."""
        digest = hashlib.sha256()
        for owner, examples in [*sorted(self.clients.items()), ("", self.test)]:
            for e in examples:
                fields = (owner, e.instruction, e.context, e.response, e.category, e.owner, e.rule)
                digest.update(json.dumps([*fields, *((turn.role, turn.text) for turn in e.turns)]).encode())
        return digest.hexdigest()

    def groups(self) -> list[str]:
        """The group of every held-out example."""
        return [_group(e, self.by) for e in self.test]


def _group(example: Example, by: str) -> str:
    return example.owner if by == "owner" else example.category


def load_data(experiment: Experiment, *, quarantine: Path | None = None) -> Dataset:
    """Read or generate, hold out, partition; all of it a function of the settings and the seed."""
    data, seed = experiment.data, experiment.seed
    examples, read = _read(experiment, quarantine)
    if data.clusters is not None:
        examples = _clustered(experiment, examples, data.clusters)
    train, held = partition.hold_out(examples, per_category=data.hold_out, seed=seed, by=data.hold_out_by)
    if not held or not train:
        raise ConfigError(
            f"{len(examples)} examples leave {len(train)} to train on and {len(held)} to test on. "
            f"Expected more data, or a smaller data.hold_out than {data.hold_out}."
        )
    pool, spare = [examples[i] for i in train], list[Example]()
    if data.pool is not None:
        chosen, rest = partition.draw_evenly(pool, data.pool, seed=seed)
        pool, spare = [pool[i] for i in chosen], [pool[i] for i in rest]
    parts = data.partition.build()(pool, data.clients, seed)
    clients = {client: [pool[i] for i in part] for client, part in parts.items()}
    table = partition.partition_table(pool, parts, by=data.hold_out_by)
    if data.private_facts:
        for client, own in clients.items():
            own.extend(microworld.private_facts(client, data.private_facts, seed=seed))
    if data.canaries is not None:
        for client, own in clients.items():
            own.extend(data.canaries.planted(client, category=own[0].category, seed=seed))
    return Dataset(clients, [examples[i] for i in held], table, data.hold_out_by, read, spare)


def _clustered(experiment: Experiment, examples: Sequence[Example], wanted: Clusters) -> list[Example]:
    """The examples with groups of alike texts as their categories."""
    from fedloom.data.clusters import (  # here, since scikit-learn takes a second to import
        clustered,
        standardized,
        tfidf,
    )

    texts = ["\n".join(e.texts) for e in examples]
    if wanted.of == "tfidf":
        features = tfidf(texts)
    else:
        model, tokenizer = _load_base(experiment)
        template = load_template(experiment, model, tokenizer)
        features = standardized(embed(model, [template.document_ids(text) for text in texts]))
    return clustered(examples, features, count=wanted.count, seed=experiment.seed)


def _read(experiment: Experiment, quarantine: Path | None) -> tuple[list[Example], Mapping[str, Any]]:
    data = experiment.data
    if data.source == "microworld":
        if data.path is not None:
            raise ConfigError('data.path is set, but data.source = "microworld" is generated; choose another source.')
        return microworld.corpus(examples=data.examples or MICROWORLD, seed=experiment.seed), {}
    examples, read = sources.load(
        data.source, data.path, columns=data.columns, split=data.split, revision=data.revision,
        on_bad=data.on_bad, quarantine=quarantine, allow_download=experiment.model.allow_download,
    )  # fmt: skip
    if data.private_facts:
        raise ConfigError('data.private_facts exists only for data.source = "microworld".')
    if data.examples is not None and data.examples < len(examples):
        chosen = numpy_stream(experiment.seed, "data", "examples").permutation(len(examples))[: data.examples]
        examples = [examples[i] for i in sorted(chosen)]
    return examples, read


def load_template(experiment: Experiment, model: Any, tokenizer: Any) -> Template:
    """The prompt format, with what this base model reads; one without weights does, too."""
    p, most = experiment.prompt, positions(model) or sys.maxsize
    return Template(
        tokenizer, format=p.format, max_length=p.max_length, positions=most, loss_on=p.loss_on, system=p.system
    )


@dataclass(frozen=True)
class Machine:
    """The one thing that touches a device: base model, tokenizer, prompt format and engine."""

    engine: LoraEngine
    template: Template
    tokenizer: Any
    base_hash: str

    @property
    def positions(self) -> int:
        """Tokens that the base model reads; many, where nothing limits it."""
        return self.template.positions

    def describe(self) -> dict[str, Any]:
        """How it computes: for the record, and for whoever wonders about the speed."""
        return {"path": self.engine.path, "reason": self.engine.path_reason,
                "decoding_reason": self.engine.decoding_reason, "base_sha256": self.base_hash,
                "trained_parameters": self.engine.layout.size, "format": self.template.format,
                "conv1d": any(t.kind == "conv1d" for t in self.engine.layout)}  # fmt: skip


def load_machine(experiment: Experiment) -> Machine:
    m = experiment.model
    model, tokenizer = _load_base(experiment)
    template = load_template(experiment, model, tokenizer)
    base_hash = models.base_hash(model)
    engine = LoraEngine.build(
        model, template.encode, lora=experiment.adapter, local=experiment.local, seed=experiment.seed,
        tokens_per_pass=m.tokens_per_pass, path=m.path, checkpointing=m.checkpointing, generation=_generation(m),
    )  # fmt: skip
    return Machine(engine, template, tokenizer, base_hash)


def _generation(model: Model) -> Generation:
    if model.vllm is None:
        return generate_all
    folder = models.base_folder(model.base, allow_download=model.allow_download)
    if folder is None:
        raise ConfigError(f"model.vllm needs a model that is on disk; got model.base={model.base!r}.")
    return VllmGeneration(folder, **model.vllm.model_dump(exclude_none=True))


def _load_base(experiment: Experiment) -> tuple[Any, Any]:
    m = experiment.model
    return models.load_base(
        m.base, dtype=m.dtype, device=m.device, quantize=None if m.quantize == "none" else m.quantize,
        allow_download=m.allow_download,
    )  # fmt: skip


def build_algorithm(chosen: Choice, experiment: Experiment, dataset: Dataset, machine: Machine) -> Algorithm:
    """An algorithm with the parts it needs, which are made from the experiment's other sections."""
    template = machine.template
    parts: Mapping[str, Callable[[], Any]] = {
        "synthesize": lambda: _synthesizer(experiment, dataset, machine),
        "contrast": lambda: template.contrast,
        "relabel": lambda: PseudoLabels(
            prompt=lambda e: template.prompt_ids(e, room=experiment.evaluation.max_new_tokens),
            decode=template.decode, stop=template.stop, response_tokens=experiment.evaluation.max_new_tokens,
        ),
    }  # fmt: skip
    built: Algorithm = chosen.build(**{name: parts[name]() for name in PARTS if chosen.takes(name)})
    return built


def _synthesizer(experiment: Experiment, dataset: Dataset, machine: Machine) -> Any:
    chosen, seed = experiment.synthesis, experiment.seed
    if chosen.make is FromPool:
        pool = dataset.spare if chosen.name == "spare" else _restyled(experiment, dataset)
        if not pool:
            raise ConfigError(
                f'synthesis.kind = "{chosen.name}" trains on examples that nobody holds, and there are none: '
                "set data.pool, so that some are left over."
            )
        return chosen.build(pool=pool, seed=seed)
    if any(e.turns for own in dataset.clients.values() for e in own):
        raise ConfigError(
            f'synthesis.kind = "{chosen.name}" writes single questions, and these data are conversations, whose last question '
            'makes no sense alone. Choose an algorithm without synthesis, or synthesis.kind = "spare".'
        )
    tokenizer = machine.tokenizer
    return chosen.build(
        encode=machine.template.document_ids, decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        stop=machine.template.stop, seed=seed, context_length=min(machine.positions, CONTEXT_LENGTH),
    )  # fmt: skip


def _restyled(experiment: Experiment, dataset: Dataset) -> list[Example]:
    """The spare examples with right answers in another style than the federation's."""
    if experiment.data.source != "microworld":
        raise ConfigError('synthesis.kind = "restyled" exists only for data.source = "microworld".')
    other = microworld.corpus(examples=experiment.data.examples or MICROWORLD, seed=experiment.seed, style=1)
    wanted = {e.id for e in dataset.spare}
    return [e for e in other if e.id in wanted]


def federated_clients(experiment: Experiment, dataset: Dataset) -> dict[ClientId, Client]:
    return {
        c: Client(c, examples, limit=_limit(experiment, len(examples))) for c, examples in dataset.clients.items()
    }


def pooled_client(experiment: Experiment, dataset: Dataset, cohort_size: float) -> dict[ClientId, Client]:
    """Centralised tuning: one client that holds what all of them hold.

    Budget "epochs": in a round it trains on as many examples as the whole cohort does together. Budget
    "steps": on as many as one client does on average, so it takes as many optimizer steps as the
    federation's longest chain.
    """
    everything = [e for examples in dataset.clients.values() for e in examples]
    sizes = [_limit(experiment, len(e)) or experiment.local.epochs * len(e) for e in dataset.clients.values()]
    share = cohort_size if experiment.compare.budget == "epochs" else 1.0
    return {"centralised": Client("centralised", everything, limit=max(1, round(float(np.mean(sizes)) * share)))}


def _limit(experiment: Experiment, size: int) -> int | None:
    cap = experiment.examples_per_round
    return None if cap is None else min(cap, experiment.local.epochs * size)
