"""Every method on the same data from one command: FedIT's four rows, and those of `compare.methods`.

FedIT's rows are base, local-only clients, owners of a few categories each (`compare.local`), federated (the
experiment's own algorithm) and centralised. Every row sees the same data, and every row of a seed the same held-out set and the same initial
adapter. In a round of any row each of its clients takes its local epochs over its own data; local-only
clients train in every round; centralised tuning sees as many examples a round as the cohort (budget
"epochs") or takes as many steps as one client (budget "steps").
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.synthetic import FATES
from fedloom.errors import FedloomError, RunError
from fedloom.evaluation.cache import Cache
from fedloom.experiment.build import build_algorithm, federated_clients, pooled_client, specialist_client
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.leakage import leakage
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.settings import Experiment, parse
from fedloom.experiment.summary import ANSWERS, measure, shared, write_json
from fedloom.experiment.training import Listener, Training
from fedloom.federation import Round
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.selection import All
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, journal

RESULT = "result.json"  # of one seed; written last
SAMPLES = 3  # generated texts kept for each fate
POLL = 1.0  # seconds between looks at the journals


def federated(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    """The experiment's own algorithm."""
    clients = federated_clients(experiment, dataset)
    select = experiment.cohort.build(clients=sorted(clients), seed=experiment.seed)
    algorithm = build_algorithm(experiment.algorithm, experiment, dataset, machine)
    return Training(
        folder, experiment, dataset, machine, algorithm, clients, select, experiment.fingerprint()
    )


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
        drawn = numpy_stream(experiment.seed, "compare", "local clients").permutation(sorted(clients))[
            :wanted
        ]
        clients = {str(c): clients[str(c)] for c in sorted(drawn)}
    quiet = experiment.with_(evaluation={**experiment.plain()["evaluation"], "every": experiment.rounds})
    algorithm = build_algorithm(experiment.algorithm, experiment, dataset, machine)
    return Training(
        folder,
        quiet,
        dataset,
        machine,
        algorithm,
        clients,
        All(sorted(clients)),
        "alone " + experiment.fingerprint(),
    )


def centralised(experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path) -> Training:
    select = experiment.cohort.build(clients=sorted(dataset.clients), seed=experiment.seed)
    cohort = fmean(len(select(r)) for r in range(experiment.rounds))
    clients = pooled_client(experiment, dataset, cohort)
    return Training(
        folder,
        experiment,
        dataset,
        machine,
        FedAvg(),
        clients,
        All(sorted(clients)),
        "centralised " + experiment.fingerprint(),
    )


def specialist(
    label: str, experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path
) -> Training:
    """A row of FedIT's table: one owner of all training examples of the categories that `compare.local` names for it."""
    categories = experiment.compare.local[experiment.compare.local_labels.index(label)]
    fingerprint = f"{label} {json.dumps(categories)} {experiment.fingerprint()}"
    clients = {label: specialist_client(experiment, dataset, label)}
    return Training(
        folder, experiment, dataset, machine, FedAvg(), clients, All(sorted(clients)), fingerprint
    )


def one_seed(experiment: Experiment, folder: Path, listener: Listener = Listener()) -> dict[str, Any]:
    """Train and measure all rows for this experiment's seed; a finished seed is read, not repeated."""
    if (done := _measured(experiment, folder)) is not None:
        return done
    with checkpoint.lock(folder):
        listener.phase("reading the data")
        dataset = load_data(experiment, quarantine=folder / "quarantine.jsonl")
        listener.phase("loading the base model")
        machine = load_machine(experiment)
        rows, synthesis = trained(experiment, dataset, machine, folder, listener)
        with measuring(folder.parent, "compare"):
            if experiment.compare.leakage:
                listener.phase("measuring leakage")
            leaks = leakage(experiment, dataset, machine, shared(rows)) if experiment.compare.leakage else {}
            measured = measure(
                experiment, dataset, machine, rows, leaks, cache=Cache(folder / ANSWERS), say=listener.phase
            )
        result = {
            **measured,
            "synthesis": synthesis,
            "engine": machine.describe(),
            "settings": _measuring(experiment),
        }
        write_json(folder / RESULT, result)
    return result


@contextmanager
def measuring(folder: Path, command: str) -> Iterator[None]:
    """What fails in here fails after the training, which is kept: say so, and how it is measured otherwise."""
    try:
        yield
    except FedloomError as error:
        raise RunError(
            f"{error}\nThe training is finished and kept; only its measurement failed. Measure it with other settings, say: "
            f"fedloom {command} --resume --out {folder} evaluation.max_new_tokens=32"
        ) from error


def _measuring(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide what a seed's result holds, beside those of its training."""
    tree = experiment.plain()
    return {
        "evaluation": tree["evaluation"],
        "audit": tree["audit"],
        "local": tree["compare"]["local"],
        "methods": tree["compare"]["methods"],
        "leakage": tree["compare"]["leakage"],
    }


def _measured(experiment: Experiment, folder: Path) -> dict[str, Any] | None:
    """A seed's result, if there is one of these settings."""
    if not (folder / RESULT).exists():
        return None
    result = read_result(folder)
    return result if result.get("settings") == _measuring(experiment) else None


def trained(
    experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path, listener: Listener = Listener()
) -> tuple[dict[str, AdapterState | None], dict[str, Any]]:
    """Every row's model in this seed's folder, and what was generated; what is finished already is read, not repeated."""
    rows: dict[str, AdapterState | None] = {"base": None}
    synthesis: dict[str, Any] = {}
    for name, (label, made) in trainings(experiment).items():
        listener.row(label)
        training = made(experiment, dataset, machine, folder / name)
        rows |= models_of(training, label, training.finish(listener))
        if found := synthesis_of(training):
            synthesis[label] = found
    return rows, synthesis


def untrained(experiment: Experiment, folder: Path) -> list[str]:
    """The rows whose training in this seed's folder has not ended."""
    return [
        label
        for name, (label, _) in trainings(experiment).items()
        if len(journal.read(folder / name / "metrics.jsonl")) <= experiment.rounds
    ]


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
    return {
        "counts": dict(counts),
        "samples": {fate: texts[:SAMPLES] for fate, texts in sorted(samples.items())},
    }


def trainings(experiment: Experiment) -> dict[str, tuple[str, Callable[..., Training]]]:
    """A seed's trainings in the order they run: folder -> what its rows are called, and what makes it."""
    owners = {label.lower(): (label, partial(specialist, label)) for label in experiment.compare.local_labels}
    methods = {
        "method-" + label.lower().replace(" ", "-"): (label, partial(method, label))
        for label in experiment.compare.methods
    }
    return {
        "local_only": ("local", local_only),
        **owners,
        **methods,
        "federated": ("federated", federated),
        "centralised": ("centralised", centralised),
    }


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text("utf-8"))


@dataclass(frozen=True)
class Doing:
    """What the process of one seed is about."""

    phase: str = "loading the base model"  # as a Listener hears it
    row: str = ""  # whose training it is
    round: int = 0  # that is trained now, from 1
    part: float = 0.0  # of that round's clients that have answered


@dataclass(frozen=True)
class Progress:
    """Rounds completed so far, over all seeds and rows, and what goes on."""

    rounds: int
    total: int
    finished: int  # seeds
    doing: Mapping[int, Doing]  # of the seeds that have a process now


def all_seeds(experiment: Experiment, folder: Path, *, jobs: int) -> Iterator[Progress]:
    """Every seed in a process of its own, `jobs` at a time; yields progress until all are there.

    Progress is read from the journals, which are the truth whoever writes them. When this generator is
    closed or fails, the processes end with it; what they had committed is gone on with next time.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(seed_folders(experiment, folder).items())
    running: dict[Path, tuple[BaseProcess, Connection]] = {}
    doing: dict[Path, Doing] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed, its = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_work, args=(there, threads, its.to_toml(), str(seed)), daemon=True
                )
                process.start()
                there.close()
                running[seed], doing[seed] = (process, here), Doing()
            connection.wait([p.sentinel for p, _ in running.values()], timeout=POLL)
            for seed, (process, here) in list(running.items()):
                ended = (
                    process.exitcode is not None
                )  # before it is listened to, so that its last words are heard
                for said in _said(here):
                    if isinstance(said, str):
                        raise RunError(said)
                    doing[seed] = said
                if ended:
                    del running[seed], doing[seed]
                    if process.exitcode != 0:
                        raise RunError(
                            f"The process of {seed.name} ended with exit code {process.exitcode}; go on with --resume."
                        )
            yield progress(experiment, folder, doing)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _said(here: Connection) -> Iterator[Doing | str]:
    """What a process has said since, and why it failed if it did."""
    with suppress(EOFError, OSError):
        while here.poll():
            yield here.recv()


def seed_folders(experiment: Experiment, folder: Path) -> Mapping[Path, Experiment]:
    return {name: experiment.with_(seed=seed) for name, seed in _names(experiment, folder).items()}


def _names(experiment: Experiment, folder: Path) -> dict[Path, int]:
    return {
        folder / f"seed-{seed}": seed
        for seed in range(experiment.seed, experiment.seed + experiment.compare.seeds)
    }


def progress(experiment: Experiment, folder: Path, doing: Mapping[Path, Doing] = {}) -> Progress:
    rounds, finished = 0, 0
    rows, names = list(trainings(experiment)), _names(experiment, folder)
    for seed in names:
        finished += _measured(experiment, seed) is not None
        for row in rows:
            rounds += max(0, len(journal.read(seed / row / "metrics.jsonl")) - 1)
    total = len(rows) * experiment.rounds * experiment.compare.seeds
    return Progress(rounds, total, finished, {names[seed]: what for seed, what in doing.items()})


class _Telling(Listener):
    """Tells the parent what this process is about, and ends the process when nobody listens any more."""

    def __init__(self, there: Connection):
        self._there = there
        self._doing = Doing()
        self._told = 0.0

    def _tell(self, **news: Any) -> None:
        self._doing = replace(self._doing, **news)
        self._told = time.monotonic()
        try:
            self._there.send(self._doing)
        except OSError as gone:
            raise KeyboardInterrupt from gone

    def phase(self, what: str) -> None:
        self._tell(phase=what, round=0, part=0.0)

    def row(self, label: str) -> None:
        self._doing = replace(self._doing, row=label)

    def started(self, *, rounds: int, completed: int, cohort: float) -> None:
        self._tell(round=completed + 1)

    def updated(self, round: Round, client: ClientId) -> None:
        if time.monotonic() - self._told > POLL / 4:  # nobody looks more often
            self._tell(part=(len(round.updates) + len(round.refused)) / max(1, len(round.cohort)))

    def committed(self, record: Mapping[str, Any]) -> None:
        self._tell(round=record["round"] + 1, part=0.0)


def _work(there: Connection, threads: int, toml: str, folder: str) -> None:
    torch.set_num_threads(threads)
    try:
        one_seed(parse(toml, "experiment.toml"), Path(folder), _Telling(there))
    except FedloomError as error:
        there.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
