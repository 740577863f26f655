"""Every method on the same data from one command: FedIT's four rows, and those of `compare.methods`.

FedIT's rows are base, local-only clients, federated (the experiment's own algorithm) and centralised. Every row sees the same data, and every row of a seed the same held-out set and the same initial
adapter. In a round of any row each of its clients takes its local epochs over its own data; local-only
clients train in every round; centralised tuning sees as many examples a round as the cohort (budget
"epochs") or takes as many steps as one client (budget "steps").
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedloom import checkpoint, journal
from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.synthetic import FATES
from fedloom.config import Experiment, parse
from fedloom.errors import FedloomError, RunError
from fedloom.experiment import (
    Dataset,
    Machine,
    build_algorithm,
    federated_clients,
    load_data,
    load_machine,
    pooled_client,
)
from fedloom.leakage import leakage
from fedloom.results import measure, shared, write_json
from fedloom.rng import numpy_stream
from fedloom.run import Listener, Training
from fedloom.selection import All
from fedloom.state import AdapterState

RESULT = "result.json"  # of one seed; written last
SAMPLES = 3  # generated texts kept for each fate
POLL = 1.0  # seconds between looks at the journals


def federated(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    """The experiment's own algorithm."""
    clients = federated_clients(experiment, dataset)
    select = experiment.cohort.build(clients=sorted(clients), seed=experiment.seed)
    algorithm = build_algorithm(experiment.algorithm, experiment, dataset, machine)
    return Training(folder, experiment, dataset, machine, algorithm, clients, select, experiment.fingerprint())


def method(label: str, experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    """The algorithm that `compare.methods` names so, in all else like the experiment's own."""
    other = experiment.with_(algorithm=experiment.compare.methods[label].plain())
    made = federated if other.algorithm.shared else alone
    return made(other, dataset, machine, folder)


def local_only(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    return alone(experiment.with_(algorithm="local_only"), dataset, machine, folder)


def alone(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    """An algorithm that shares no model: every client trains in every round, or those `compare.local_clients` draws."""
    clients = federated_clients(experiment, dataset)
    wanted = experiment.compare.local_clients
    if wanted is not None and wanted < len(clients):
        drawn = numpy_stream(experiment.seed, "compare", "local clients").permutation(sorted(clients))[:wanted]
        clients = {str(c): clients[str(c)] for c in sorted(drawn)}
    quiet = experiment.with_(evaluation={**experiment.plain()["evaluation"], "every": experiment.rounds})
    algorithm = build_algorithm(experiment.algorithm, experiment, dataset, machine)
    return Training(folder, quiet, dataset, machine, algorithm, clients, All(sorted(clients)), "alone " + experiment.fingerprint())


def centralised(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    select = experiment.cohort.build(clients=sorted(dataset.clients), seed=experiment.seed)
    cohort = fmean(len(select(r)) for r in range(experiment.rounds))
    clients = pooled_client(experiment, dataset, cohort)
    return Training(folder, experiment, dataset, machine, FedAvg(), clients, All(sorted(clients)), "centralised " + experiment.fingerprint())


def one_seed(experiment: Experiment, folder: Path, listener: Listener = Listener()) -> dict[str, Any]:
    """Train and measure all rows for this experiment's seed; a finished seed is read, not repeated."""
    if (folder / RESULT).exists():
        return read_result(folder)
    with checkpoint.lock(folder):
        dataset, machine = load_data(experiment, quarantine=folder / "quarantine.jsonl"), load_machine(experiment)
        rows: dict[str, AdapterState | None] = {"base": None}
        synthesis: dict[str, Any] = {}
        for name, (label, made) in trainings(experiment).items():
            training = made(experiment, dataset, machine, folder / name)
            rows |= models_of(training, label, training.finish(listener))
            if found := synthesis_of(training):
                synthesis[label] = found
        leaks = leakage(experiment, dataset, machine, shared(rows)) if experiment.compare.leakage else {}
        measured = measure(experiment, dataset, machine, rows, leaks)
        result = {**measured, "synthesis": synthesis, "engine": machine.describe()}
        write_json(folder / RESULT, result)
    return result


def models_of(training: Training, label: str, state: ServerState) -> dict[str, AdapterState]:
    """The rows a finished training makes: the shared model, and the personal ones of its clients."""
    rows = {label: state.adapter} if training.algorithm.shared else {}
    prefix = f"{label} personal" if training.algorithm.shared else "local" if label == "federated" else label
    own = {c.id: training.algorithm.personal(c) for c in training.clients.values()}
    return rows | {f"{prefix}:{client}": adapter for client, adapter in own.items() if adapter is not None}


def synthesis_of(training: Training) -> dict[str, Any] | None:
    """What was generated: counts by fate over all rounds and clients, and a few texts of each fate; None: nothing.

    Both are in a simulation's reports alone; on a network they would stay with their clients.
    """
    counts: Counter[str] = Counter()
    for record in journal.read(training.folder / "metrics.jsonl"):
        for metrics in record.get("unsent", {}).values():
            counts.update({k.removeprefix(FATES): int(n) for k, n in metrics.items() if k.startswith(FATES)})
    if not counts:
        return None
    samples: dict[str, list[Any]] = {}
    for client in training.clients.values():
        for fate, texts in client.memory.get("synthetic", {}).get("samples", {}).items():
            samples.setdefault(fate, []).extend({"client": client.id, **text} for text in texts)
    return {"counts": dict(counts), "samples": {fate: texts[:SAMPLES] for fate, texts in sorted(samples.items())}}


def trainings(experiment: Experiment) -> dict[str, tuple[str, Callable[..., Training]]]:
    """A seed's trainings in the order they run: folder -> what its rows are called, and what makes it."""
    methods = {"method-" + label.lower().replace(" ", "-"): (label, partial(method, label)) for label in experiment.compare.methods}
    return {
        "local_only": ("local", local_only),
        **methods,
        "federated": ("federated", federated),
        "centralised": ("centralised", centralised),
    }


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text("utf-8"))


@dataclass(frozen=True)
class Progress:
    """Rounds completed so far, over all seeds and rows."""

    rounds: int
    total: int
    finished: int  # seeds
    latest: str


def all_seeds(experiment: Experiment, folder: Path, *, jobs: int) -> Iterator[Progress]:
    """Every seed in a process of its own, `jobs` at a time; yields progress until all are there.

    Progress is read from the journals, which are the truth whoever writes them. When this generator is
    closed or fails, the processes end with it; what they had committed is gone on with next time.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(seed_folders(experiment, folder).items())
    running: dict[Path, tuple[BaseProcess, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed, its = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_work, args=(there, threads, its.to_toml(), str(seed)), daemon=True)
                process.start()
                there.close()
                running[seed] = (process, here)
            connection.wait([p.sentinel for p, _ in running.values()], timeout=POLL)
            for seed in [seed for seed, (process, _) in running.items() if process.exitcode is not None]:
                process, here = running.pop(seed)
                _check(seed, process, here)
            yield progress(experiment, folder)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _check(seed: Path, process: BaseProcess, here: Connection) -> None:
    if process.exitcode == 0:
        return
    try:
        said = here.recv() if here.poll() else ""
    except EOFError:
        said = ""
    raise RunError(said or f"The process of {seed.name} ended with exit code {process.exitcode}; go on with --resume.")


def seed_folders(experiment: Experiment, folder: Path) -> Mapping[Path, Experiment]:
    return {name: experiment.with_(seed=seed) for name, seed in _names(experiment, folder).items()}


def _names(experiment: Experiment, folder: Path) -> dict[Path, int]:
    return {folder / f"seed-{seed}": seed for seed in range(experiment.seed, experiment.seed + experiment.compare.seeds)}


def progress(experiment: Experiment, folder: Path) -> Progress:
    rounds, finished, latest = 0, 0, ""
    rows = list(trainings(experiment))
    for seed in _names(experiment, folder):
        finished += (seed / RESULT).exists()
        for row in rows:
            done = len(journal.read(seed / row / "metrics.jsonl"))
            rounds += max(0, done - 1)
            if 0 < done <= experiment.rounds:
                latest = f"{seed.name} {row} round {done}"
    return Progress(rounds, len(rows) * experiment.rounds * experiment.compare.seeds, finished, latest)


class _WithParent(Listener):
    """Ends the worker when the process that wanted its result is gone."""

    def committed(self, record: Mapping[str, Any]) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise KeyboardInterrupt


def _work(there: Connection, threads: int, toml: str, folder: str) -> None:
    torch.set_num_threads(threads)
    try:
        one_seed(parse(toml, "experiment.toml"), Path(folder), _WithParent())
    except FedloomError as error:
        there.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
