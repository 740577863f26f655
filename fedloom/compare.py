"""The four rows of FedIT's table from one command: base, local-only clients, federated, centralised.

Every row sees the same data, and every row of a seed the same held-out set and the same initial
adapter. In a round of any row each of its clients takes its local epochs over its own data; local-only
clients train in every round; centralised tuning sees as many examples a round as the cohort (budget
"epochs") or takes as many steps as one client (budget "steps").
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedloom import checkpoint, journal
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local_only import LocalOnly
from fedloom.config import Experiment, parse
from fedloom.errors import FedloomError, RunError
from fedloom.experiment import Dataset, Machine, federated_clients, load_data, load_machine, pooled_client
from fedloom.results import LOCAL, measure, write_json
from fedloom.rng import numpy_stream
from fedloom.run import Listener, Training
from fedloom.selection import All
from fedloom.state import AdapterState

RESULT = "result.json"  # of one seed; written last


def federated(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    clients = federated_clients(experiment, dataset)
    select = experiment.cohort.build(clients=sorted(clients), seed=experiment.seed)
    return Training(folder, experiment, dataset, machine, experiment.algorithm.build(), clients, select, experiment.fingerprint())


def local_only(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    clients = federated_clients(experiment, dataset)
    wanted = experiment.compare.local_clients
    if wanted is not None and wanted < len(clients):
        drawn = numpy_stream(experiment.seed, "compare", "local clients").permutation(sorted(clients))[:wanted]
        clients = {str(c): clients[str(c)] for c in sorted(drawn)}
    quiet = experiment.with_(evaluation={**experiment.plain()["evaluation"], "every": experiment.rounds})
    return Training(folder, quiet, dataset, machine, LocalOnly(), clients, All(sorted(clients)), "local_only " + experiment.fingerprint())


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
        alone = local_only(experiment, dataset, machine, folder / "local_only")
        alone.finish(listener)
        for client in alone.clients.values():
            rows[LOCAL + client.id] = client.memory["adapter"]
        rows["federated"] = federated(experiment, dataset, machine, folder / "federated").finish(listener).adapter
        rows["centralised"] = centralised(experiment, dataset, machine, folder / "centralised").finish(listener).adapter
        result = {**measure(experiment, dataset, machine, rows), "engine": machine.describe()}
        write_json(folder / RESULT, result)
    return result


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
            connection.wait([p.sentinel for p, _ in running.values()], timeout=0.5)
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
    seeds = range(experiment.seed, experiment.seed + experiment.compare.seeds)
    return {folder / f"seed-{seed}": experiment.with_(seed=seed) for seed in seeds}


def progress(experiment: Experiment, folder: Path) -> Progress:
    rounds, finished, latest = 0, 0, ""
    for seed in seed_folders(experiment, folder):
        finished += (seed / RESULT).exists()
        for row in ("local_only", "federated", "centralised"):
            done = len(journal.read(seed / row / "metrics.jsonl"))
            rounds += max(0, done - 1)
            if 0 < done <= experiment.rounds:
                latest = f"{seed.name} {row} round {done}"
    return Progress(rounds, 3 * experiment.rounds * experiment.compare.seeds, finished, latest)


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
