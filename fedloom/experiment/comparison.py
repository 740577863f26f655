"""Every method on the same data from one command, over seeds; progress, and one result a seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fedloom.errors import FedloomError, RunError
from fedloom.evaluation.cache import Cache
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.leakage import leakage
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.settings import Experiment
from fedloom.experiment.simulation import trainings
from fedloom.experiment.summary import ANSWERS, measure, shared, write_json
from fedloom.experiment.toml import parse
from fedloom.federation import Round
from fedloom.messages import ClientId
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, journal

RESULT = "result.json"  # of one seed; written last
POLL = 1.0  # seconds between looks at the journals


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
        simulated = made(experiment, dataset, machine, folder / name)
        rows |= simulated.models(label, simulated.finish(listener))
        if found := simulated.synthesis():
            synthesis[label] = found
    return rows, synthesis


def untrained(experiment: Experiment, folder: Path) -> list[str]:
    """The rows whose training in this seed's folder has not ended."""
    return [
        label
        for name, (label, _) in trainings(experiment).items()
        if len(journal.read(folder / name / "metrics.jsonl")) <= experiment.rounds
    ]


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
