"""From an experiment's settings to the objects that run: data, engine, clients, federation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.config import PARTS, Choice, Clusters, Data, Experiment, Model
from fedloom.data import held_out, microworld, partition, sources
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.errors import ConfigError
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.pseudo_labels import PseudoLabels

if TYPE_CHECKING:  # settings and data are read without waiting for torch
    from fedloom.engine.lora_engine import Generation, LoraEngine

MICROWORLD = 640  # examples, where data.examples does not say
FOREIGN = (
    "path",
    "columns",
    "owner",
    "test_path",
    "field",
    "delimiter",
    "encoding",
    "split",
    "revision",
    "on_bad",
)
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

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user: what was read otherwise than expected, left out, or not used."""
        return self.read.get("notes", ())

    def mix(self, client: ClientId) -> Mapping[str, float]:
        """The shares of this client's training examples over the groups of the held-out set."""
        groups = [partition.group(e, self.by) for e in self.clients[client]]
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
        return [partition.group(e, self.by) for e in self.test]


def load_data(experiment: Experiment, *, quarantine: Path | None = None) -> Dataset:
    """Read or generate, hold out, partition; all of it a function of the settings and the seed."""
    data, seed = experiment.data, experiment.seed
    examples, test, read = _read(experiment, quarantine)
    notes = list(read.pop("notes", ()))
    owners = {e.owner for e in examples} if data.partition.make is partition.ByOwner else set[str]()

    def tell_lost(kept: Sequence[Example], by: str) -> None:
        """Who takes examples away says whose last ones these were."""
        if lost := sorted(owners - {e.owner for e in kept}):
            notes.append(
                f"{len(lost)} of {len(owners)} owners have no example left after {by}, and are no clients: {_some(lost)}."
            )
            owners.difference_update(lost)

    if data.examples is not None and data.examples < len(examples) and data.source != "microworld":
        drawn = numpy_stream(seed, "data", "examples").permutation(len(examples))[: data.examples].tolist()
        notes.append(
            f"data.examples = {data.examples}: {data.examples:,} of {len(examples):,} examples, drawn at random."
        )
        examples = [examples[i] for i in sorted(drawn)]
        tell_lost(examples, f"data.examples = {data.examples}")
    if data.clusters is not None:
        examples = _clustered(
            experiment, examples, data.clusters
        )  # a test set of one's own has no say in them
    if (along := data.partition.options.get("by")) is not None:
        partition.check_labels(examples, along, f'data.partition.kind = "{data.partition.name}"')
    if data.test_path is None:
        train, held = held_out.hold_out(
            examples, per_category=data.hold_out, seed=seed, by=data.hold_out_by, keep_owners=bool(owners)
        )
        pool, test = [examples[i] for i in train], [examples[i] for i in held]
        if data.hold_out_by == "category" and not any(e.category for e in examples):
            notes.append(
                f"No example names a category: {len(held)} of all {len(examples):,} examples are held out."
            )
    else:
        pool = held_out.apart(examples, test)
        if twins := len(examples) - len(pool):
            notes.append(
                f"{twins:,} of {len(examples):,} training examples ask what the test set asks, and are left out of training."
            )
        tell_lost(pool, "leaving those out")
    if not test or not pool:
        raise ConfigError(
            f"{len(examples)} examples leave {len(pool)} to train on and {len(test)} to test on. "
            f"Expected more data, or a smaller data.hold_out than {data.hold_out}: at most half of a category is held "
            "out, nothing that is asked twice, and where clients are owners not the last example of one."
        )
    spare = list[Example]()
    if data.pool is not None:
        chosen, rest = partition.draw_evenly(pool, data.pool, seed=seed)
        pool, spare = [pool[i] for i in chosen], [pool[i] for i in rest]
        tell_lost(pool, f"data.pool = {data.pool}")
    parts = data.partition.build()(pool, data.clients, seed)
    clients = {client: [pool[i] for i in part] for client, part in parts.items()}
    table = partition.partition_table(pool, parts, by=data.hold_out_by)
    if data.private_facts:
        for client, own in clients.items():
            own.extend(microworld.private_facts(client, data.private_facts, seed=seed))
    if data.canaries is not None:
        for client, own in clients.items():
            own.extend(data.canaries.planted(client, category=own[0].category, seed=seed))
    return Dataset(clients, test, table, data.hold_out_by, {**read, "notes": notes}, spare)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
        from fedloom.engine.embedding import embed

        model, tokenizer = _load_base(experiment)
        template = load_template(experiment, model, tokenizer)
        features = standardized(embed(model, [template.document_ids(text) for text in texts]))
    return clustered(examples, features, count=wanted.count, seed=experiment.seed)


def _read(
    experiment: Experiment, quarantine: Path | None
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """Examples, a test set where the user has one, and what the reader reports."""
    data = experiment.data
    if wrong := list(_misplaced(experiment)):
        if data.examples is not None and data.source != "microworld":
            wrong.append(
                f"data.examples = {data.examples}: would be that many of the records, drawn at random; raise it for all"
            )
        raise ConfigError(
            "\n  ".join([f'These settings do not go with data.source = "{data.source}":', *wrong])
        )
    if data.source == "microworld":
        return microworld.corpus(examples=data.examples or MICROWORLD, seed=experiment.seed), [], {}
    load = partial(
        sources.load,
        data.source,
        split=data.split,
        revision=data.revision,
        on_bad=data.on_bad,
        owner=data.owner,
        field=data.field,
        delimiter=data.delimiter,
        encoding=data.encoding,
        allow_download=experiment.model.allow_download,
    )
    examples, read = load(data.path, columns=data.columns, quarantine=quarantine)
    if data.test_path is None:
        return examples, [], read
    apart = quarantine and quarantine.with_name(f"test-{quarantine.name}")
    test, its = load(
        data.test_path, columns=data.columns, test_columns=data.test_columns or {}, quarantine=apart
    )
    notes = [*read.pop("notes"), *(f"test set: {note}" for note in its.pop("notes"))]
    return examples, test, {**read, "test_set": its, "notes": notes}


def _misplaced(experiment: Experiment) -> Iterator[str]:
    """Every setting that says nothing about this source; a recipe made for another one has several."""
    data, default = experiment.data, Data()
    generated = data.source == "microworld"
    for key in FOREIGN if generated else () if data.source == "hub" else ("split", "revision"):
        if getattr(data, key) != getattr(default, key):
            yield f"data.{key}: " + (
                "the microworld is generated, and nothing is read" if generated else "only for the Hub"
            )
    if not generated and data.private_facts:
        yield f"data.private_facts = {data.private_facts}: only the microworld has such facts; set it to 0"
    if not generated and experiment.synthesis.name == "restyled":
        yield 'synthesis.kind = "restyled": only the microworld has another style; take "spare" or "self_instruct"'
    if data.source == "alpaca" and data.clusters is None and data.partition.options.get("by") == "category":
        yield (
            f'data.partition.kind = "{data.partition.name}": splits by category, and Alpaca\'s format has none. '
            + partition.WAYS_OUT["category"]
        )
    if (
        data.owner == "file"
        and "owner" not in (data.partition.options.get("by"), data.hold_out_by)
        and data.partition.make is not partition.ByOwner
    ):
        yield f'data.owner = "file": no use is made of owners; for a client of each file set data.partition.kind = "by_owner" (now "{data.partition.name}")'
    if data.test_columns is not None and data.test_path is None:
        yield "data.test_columns: there is no data.test_path"


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

    m = experiment.model
    model, tokenizer = _load_base(experiment)
    template = load_template(experiment, model, tokenizer)
    base_hash, base_sha256 = models.base_hash(model), models.identity(m.base, allow_download=m.allow_download)
    end_reachable = reachable(model, template.end)
    engine = LoraEngine.build(
        model,
        template.encode,
        lora=experiment.adapter,
        local=experiment.local,
        seed=experiment.seed,
        tokens_per_pass=m.tokens_per_pass,
        path=m.path,
        checkpointing=m.checkpointing,
        generation=_generation(m),
    )
    return Machine(engine, template, tokenizer, base_hash, base_sha256, end_reachable)


def _generation(model: Model) -> Generation:
    from fedloom.engine import models
    from fedloom.engine.generation import generate_all
    from fedloom.engine.vllm_backend import VllmGeneration

    if model.vllm is None:
        return generate_all
    folder = models.base_folder(model.base, allow_download=model.allow_download)
    if folder is None:
        raise ConfigError(f"model.vllm needs a model that is on disk; got model.base={model.base!r}.")
    return VllmGeneration(folder, **model.vllm.model_dump(exclude_none=True))


def _load_base(experiment: Experiment) -> tuple[Any, Any]:
    from fedloom.engine import models

    m = experiment.model
    return models.load_base(
        m.base,
        dtype=m.dtype,
        device=m.device,
        quantize=None if m.quantize == "none" else m.quantize,
        allow_download=m.allow_download,
    )


def build_algorithm(
    chosen: Choice, experiment: Experiment, dataset: Dataset, machine: Machine | Skeleton
) -> Algorithm:
    """An algorithm with the parts it needs, which are made from the experiment's other sections."""
    template = machine.template
    parts: Mapping[str, Callable[[], Any]] = {
        "synthesize": lambda: _synthesizer(experiment, dataset, machine),
        "contrast": lambda: template.contrast,
        "relabel": lambda: PseudoLabels(
            prompt=lambda e: template.prompt_ids(e, room=experiment.evaluation.max_new_tokens),
            decode=template.decode,
            stop=template.stop,
            response_tokens=experiment.evaluation.max_new_tokens,
        ),
    }
    built: Algorithm = chosen.build(**{name: parts[name]() for name in PARTS if chosen.takes(name)})
    return built


def _synthesizer(experiment: Experiment, dataset: Dataset, machine: Machine | Skeleton) -> Any:
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
        encode=machine.template.document_ids,
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        stop=machine.template.stop,
        seed=seed,
        context_length=min(machine.positions, CONTEXT_LENGTH),
    )


def _restyled(experiment: Experiment, dataset: Dataset) -> list[Example]:
    """The spare examples with right answers in another style than the federation's."""
    if experiment.data.source != "microworld":
        raise ConfigError('synthesis.kind = "restyled" exists only for data.source = "microworld".')
    other = microworld.corpus(examples=experiment.data.examples or MICROWORLD, seed=experiment.seed, style=1)
    wanted = {e.id for e in dataset.spare}
    return [e for e in other if e.id in wanted]


def federated_clients(experiment: Experiment, dataset: Dataset) -> dict[ClientId, Client]:
    return {c: client_of(experiment, c, examples) for c, examples in dataset.clients.items()}


def client_of(experiment: Experiment, name: ClientId, examples: Sequence[Example]) -> Client:
    return Client(name, examples, limit=_limit(experiment, len(examples)))


def specialist_client(experiment: Experiment, dataset: Dataset, label: str) -> Client:
    """The owner of all training examples in the categories that `compare.local` has for this label. Raises ConfigError."""
    categories = experiment.compare.local[experiment.compare.local_labels.index(label)]
    everything = [e for examples in dataset.clients.values() for e in examples]
    known = sorted({e.category for e in everything} - {""})
    if unknown := [c for c in categories if c not in known]:
        raise ConfigError(
            f"compare.local names the category {unknown[0]!r}, which no training example has. "
            + (
                f"Expected some of {', '.join(known)}."
                if known
                else "The examples have no categories; data.clusters makes some."
            )
        )
    return client_of(experiment, label, [e for e in everything if e.category in categories])


def pooled_client(experiment: Experiment, dataset: Dataset, cohort_size: float) -> dict[ClientId, Client]:
    """Centralised tuning: one client that holds what all of them hold.

    Budget "epochs": in a round it trains on as many examples as the whole cohort does together. Budget
    "steps": on as many as one client does on average, or on more, so that it takes as many optimizer steps.
    """
    local = experiment.local
    everything = [e for examples in dataset.clients.values() for e in examples]
    sizes = [len(examples) for examples in dataset.clients.values()]
    counts = [
        _limit(experiment, n) or local.epochs * n for n in sizes
    ]  # examples that each client takes in a round
    share = cohort_size if experiment.compare.budget == "epochs" else 1.0
    limit = max(1, round(float(np.mean(counts)) * share))
    if experiment.compare.budget == "steps":  # clients with few examples take more steps on as many
        steps = round(
            float(np.mean([local.steps_of(n, count) for n, count in zip(sizes, counts, strict=True)]))
        )
        while local.steps_of(len(everything), limit) < steps:
            limit += 1
    return {"centralised": Client("centralised", everything, limit=limit)}


def _limit(experiment: Experiment, size: int) -> int | None:
    cap = experiment.examples_per_round
    return None if cap is None else min(cap, experiment.local.epochs * size)
