"""One seed's trainings, with all their clients simulated: FedIT's rows and those of `compare.methods`.

Every row sees the same data, the same held-out set and the same initial adapter. In every row, a client's
round is its local epochs over its own data; local-only clients train in every round; centralised tuning sees
as many examples a round as the cohort (budget "epochs") or takes as many steps as one client (budget
"steps").
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.synthetic import FATES
from fedloom.client import Client
from fedloom.experiment.build import cohorts, federated_clients, pooled_client, specialist_client, tools
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.inputs import inputs_of
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine
from fedloom.experiment.observers import held_out, leaked, unsent_metrics
from fedloom.experiment.settings import Experiment
from fedloom.experiment.training import Training
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.rows import FEDERATED, LOCAL, Row
from fedloom.selection import All
from fedloom.state import AdapterState
from fedloom.storage import files, journal
from fedloom.transport.in_process import Simulation

SAMPLES = 3  # generated texts kept per fate


@dataclass(frozen=True)
class Simulated:
    """A training together with all its clients."""

    training: Training
    clients: Mapping[ClientId, Client]

    def finish(self, listener: Listener) -> ServerState:
        return self.training.finish(listener)

    def models(self, label: str, state: ServerState) -> dict[str, AdapterState]:
        """The rows that a finished training yields: the shared model and its clients' personal ones."""
        algorithm = self.training.algorithm
        rows = {label: state.adapter} if algorithm.shared else {}
        made_by = LOCAL if label == FEDERATED and not algorithm.shared else label
        own = {c.id: algorithm.personal(c) for c in self.clients.values()}
        return rows | {
            str(Row(made_by, "personal", client, beside=algorithm.shared)): adapter
            for client, adapter in own.items()
            if adapter is not None
        }

    def synthesis(self) -> dict[str, Any] | None:
        """Generated texts: counts by fate, over all rounds and clients, and a few of each; None without any.

        Only a simulation can report them; on a network they would stay with their clients.
        """
        counts: Counter[str] = Counter()
        for record in journal.read(self.training.folder / files.METRICS):
            for metrics in record.get("unsent", {}).values():
                counts.update(
                    {k.removeprefix(FATES): int(n) for k, n in metrics.items() if k.startswith(FATES)}
                )
        if not counts:
            return None
        samples: dict[str, list[Any]] = {}
        for client in self.clients.values():
            for fate, texts in client.memory.get("synthetic", {}).get("samples", {}).items():
                samples.setdefault(fate, []).extend({"client": client.id, **text} for text in texts)
        return {
            "counts": dict(counts),
            "samples": {fate: texts[:SAMPLES] for fate, texts in sorted(samples.items())},
        }


Maker = Callable[[Experiment, Dataset, Machine, Path], Simulated]


def trainings(experiment: Experiment) -> dict[str, tuple[str, Maker]]:
    """A seed's trainings in the order they run: folder -> its rows' name, and its builder."""
    owners = {label.lower(): (label, partial(specialist, label)) for label in experiment.compare.local_labels}
    methods = {files.method(label): (label, partial(method, label)) for label in experiment.compare.methods}
    return {
        "local_only": ("local", local_only),
        **owners,
        **methods,
        "federated": ("federated", federated),
        "centralised": ("centralised", centralised),
    }


def batches(experiment: Experiment, dataset: Dataset) -> int:
    """The number of client batches in the largest round of the experiment's own algorithm."""
    select = cohorts(experiment, sorted(dataset.clients))
    largest = max(len(select(r)) for r in range(experiment.rounds))
    return max(1, math.ceil(largest / experiment.machine.clients_per_batch))


def federated(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Simulated:
    """The experiment's own algorithm."""
    algorithm = experiment.algorithm
    clients = federated_clients(experiment, dataset, tools(algorithm, experiment, dataset, machine.template))
    select = cohorts(experiment, sorted(clients))
    return simulated(
        experiment, dataset, machine, folder, algorithm, clients, select, experiment.fingerprint()
    )


def method(label: str, experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Simulated:
    """The algorithm under this label in `compare.methods`, otherwise set up like the experiment's own."""
    other = experiment.with_(algorithm=experiment.compare.methods[label])
    made = federated if other.algorithm.shared else alone
    return made(other, dataset, machine, folder)


def local_only(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Simulated:
    return alone(experiment.with_(algorithm="local_only"), dataset, machine, folder)


def alone(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Simulated:
    """An algorithm without a shared model: its clients (see `compare.local_clients`) train every round."""
    algorithm = experiment.algorithm
    clients = federated_clients(experiment, dataset, tools(algorithm, experiment, dataset, machine.template))
    wanted = experiment.compare.local_clients
    if wanted is not None and wanted < len(clients):
        order = numpy_stream(experiment.seed, "compare", "local clients").permutation(sorted(clients))
        clients = {str(c): clients[str(c)] for c in sorted(order[:wanted])}
    fingerprint = "alone " + experiment.fingerprint()
    return simulated(
        experiment,
        dataset,
        machine,
        folder,
        algorithm,
        clients,
        partial(All(), sorted(clients), experiment.seed),
        fingerprint,
    )


def centralised(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Simulated:
    select = cohorts(experiment, sorted(dataset.clients))
    clients = pooled_client(experiment, dataset, fmean(len(select(r)) for r in range(experiment.rounds)))
    fingerprint = "centralised " + experiment.fingerprint()
    return simulated(
        experiment,
        dataset,
        machine,
        folder,
        FedAvg(),
        clients,
        partial(All(), sorted(clients), experiment.seed),
        fingerprint,
    )


def specialist(
    label: str, experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path
) -> Simulated:
    """A row of FedIT's table: one owner of all training examples in its categories in `compare.local`."""
    categories = experiment.compare.local[experiment.compare.local_labels.index(label)]
    clients = {label: specialist_client(experiment, dataset, label)}
    fingerprint = f"{label} {json.dumps(categories)} {experiment.fingerprint()}"
    return simulated(
        experiment,
        dataset,
        machine,
        folder,
        FedAvg(),
        clients,
        partial(All(), sorted(clients), experiment.seed),
        fingerprint,
    )


def simulated(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    folder: Path,
    algorithm: Algorithm,
    clients: Mapping[ClientId, Client],
    select: Callable[[int], Sequence[ClientId]],
    fingerprint: str,
) -> Simulated:
    inputs = inputs_of(dataset, machine)
    machine = machine.ranked(-_steps(clients))  # whoever has most to do one after the other begins first
    transport = Simulation(
        algorithm,
        machine.engine,
        clients,
        clients_per_batch=experiment.machine.clients_per_batch,
        codec=experiment.transport.codec,
        experiment=_identity(fingerprint, inputs),
    )
    training = Training(
        folder,
        algorithm,
        transport,
        select,
        start=machine.initial_adapter(experiment.seed),
        rounds=experiment.rounds,
        inputs=inputs,
        fingerprint=fingerprint,
        observe=(
            unsent_metrics(clients),
            held_out(experiment, dataset, machine, algorithm, clients),
            leaked(experiment, dataset, machine, algorithm),
        ),
        gate=experiment.gate,
    )
    return Simulated(training, clients)


def _steps(clients: Mapping[ClientId, Client]) -> int:
    """The most optimizer steps that one client takes in a round."""
    counts = (
        c.local.steps_of(n, c.local.epochs * n if c.limit is None else c.limit)
        for c in clients.values()
        if (n := len(c.examples))
    )
    return max(counts, default=0)


def _identity(fingerprint: str, inputs: Mapping[str, str]) -> str:
    """The name of settings and base model in every message, so that neither end serves another experiment."""
    return hashlib.sha256(f"{fingerprint} {inputs['base_sha256']}".encode()).hexdigest()[:16]
