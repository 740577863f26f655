"""From settings to data: read or generated, held out, partitioned among clients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data import held_out, microworld, partition, sources
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.experiment.settings import PARTITION, Clusters, Data, Experiment
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.synthesis.pool import OtherStyle

if TYPE_CHECKING:  # settings and data are read without waiting for torch
    pass

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


@dataclass(frozen=True)
class Dataset:
    """Who holds what, and what nobody trains on."""

    clients: Mapping[ClientId, Sequence[Example]]
    test: Sequence[Example]
    table: partition.PartitionTable  # of the training examples
    by: partition.Label  # how the held-out examples are grouped: by category, or by owner
    read: Mapping[str, Any] = field(default_factory=dict)  # what the reader reported
    spare: Sequence[Example] = ()  # left over by data.pool: neither trained on nor tested on

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user about records read differently than expected, left out, or unused."""
        notes: Sequence[str] = self.read.get("notes", ())
        return notes

    def mix(self, client: ClientId) -> Mapping[str, float]:
        """The shares of this client's training examples over the groups of the held-out set."""
        groups = [partition.group(e, self.by) for e in self.clients[client]]
        return {g: groups.count(g) / len(groups) for g in sorted(set(groups))}

    def sha256(self) -> str:
        """A hash over every example, who holds it and which are held out: other data give another hash."""
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
    """Read or generate, hold out, partition: entirely a function of the settings and the seed."""
    data, seed = experiment.data, experiment.seed
    examples, test, read = _read(experiment, quarantine)
    notes = list(read.pop("notes", ()))
    owners = {e.owner for e in examples} if isinstance(data.partition, partition.ByOwner) else set[str]()

    def tell_lost(kept: Sequence[Example], by: str) -> None:
        """Note the owners who lost their last example in the step called `by`."""
        if lost := sorted(owners - {e.owner for e in kept}):
            notes.append(
                f"{len(lost)} of {len(owners)} owners have no example left after {by} and so are not clients: {_some(lost)}."
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
        )  # a test set of the user's own plays no part in them
    if (along := data.partition.by) is not None:
        partition.check_labels(examples, along, f'data.partition.kind = "{PARTITION.name(data.partition)}"')
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
            f"Expected more data, or data.hold_out below {data.hold_out}: at most half of a category is held "
            "out, no question that is asked twice, and, where clients are owners, no owner's last example."
        )
    spare = list[Example]()
    if data.pool is not None:
        chosen, rest = partition.draw_evenly(pool, data.pool, seed=seed)
        pool, spare = [pool[i] for i in chosen], [pool[i] for i in rest]
        tell_lost(pool, f"data.pool = {data.pool}")
    parts = data.partition(pool, data.clients, seed)
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
    """The examples, with clusters of similar texts as their categories."""
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
        from fedloom.experiment.machine import load_base, load_template

        model, tokenizer = load_base(experiment)
        template = load_template(experiment, model, tokenizer)
        features = standardized(embed(model, [template.document_ids(text) for text in texts]))
    return clustered(examples, features, count=wanted.count, seed=experiment.seed)


def _read(
    experiment: Experiment, quarantine: Path | None
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """Examples, the user's test set if there is one, and the reader's notes."""
    data = experiment.data
    if wrong := list(_misplaced(experiment)):
        if data.examples is not None and data.source != "microworld":
            wrong.append(
                f"data.examples = {data.examples}: that many of the records would be drawn at random; raise it to use all"
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
    """Every setting that does not apply to this source; a recipe made for another source has several."""
    data, default = experiment.data, Data()
    generated = data.source == "microworld"
    for key in FOREIGN if generated else () if data.source == "hub" else ("split", "revision"):
        if getattr(data, key) != getattr(default, key):
            yield f"data.{key}: " + (
                "the microworld is generated, not read" if generated else "only for the Hub"
            )
    if not generated and data.private_facts:
        yield f"data.private_facts = {data.private_facts}: only the microworld has private facts; set it to 0"
    if not generated and isinstance(experiment.synthesis, OtherStyle):
        yield 'synthesis.kind = "other_style": only the microworld has another style; take "held_back" or "self_instruct"'
    if data.source == "alpaca" and data.clusters is None and data.partition.by == "category":
        yield (
            f'data.partition.kind = "{PARTITION.name(data.partition)}": splits by category, and Alpaca\'s format has none. '
            + partition.WAYS_OUT["category"]
        )
    if (
        data.owner == "file"
        and "owner" not in (data.partition.by, data.hold_out_by)
        and not isinstance(data.partition, partition.ByOwner)
    ):
        yield f'data.owner = "file": owners are not used; for one client per file set data.partition.kind = "by_owner" (now "{PARTITION.name(data.partition)}")'
    if data.test_columns is not None and data.test_path is None:
        yield "data.test_columns: there is no data.test_path"
