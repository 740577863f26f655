"""Every method on the same data from one command, over seeds; progress, and one result a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from fedloom.algorithms.base import ServerState
from fedloom.errors import FedloomError, RunError
from fedloom.evaluation.cache import Cache
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine
from fedloom.experiment.measure import leaks, measure, shared
from fedloom.experiment.settings import Experiment
from fedloom.experiment.simulation import Maker, Simulated, trainings
from fedloom.federation import Round
from fedloom.messages import ClientId
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, files, journal
from fedloom.storage.files import ANSWERS, METRICS, RESULT, write_json

POLL = 1.0  # seconds between looks at the journals
T = TypeVar("T")
R = TypeVar("R")
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def one_seed(
    experiment: Experiment, dataset: Dataset, machine: Machine, folder: Path, each: Each, watch: Watch
) -> dict[str, Any]:
    """Train and measure all rows for this experiment's seed; a finished seed is read, not repeated.

    `each` maps a function over the rows, like `map` or in several threads.
    """
    if (done := measured(experiment, folder)) is not None:
        return done
    with checkpoint.lock(folder):
        rows, synthesis = trained(experiment, dataset, machine, folder, each, watch)
        with measuring(folder.parent, "compare"):
            if experiment.compare.leakage:
                watch.phase("measuring leakage")
            given_away = (
                leaks(experiment, dataset, machine, shared(rows)) if experiment.compare.leakage else {}
            )
            found = measure(
                experiment,
                dataset,
                machine,
                rows,
                given_away,
                cache=Cache(folder / ANSWERS),
                say=watch.phase,
            )
        result = {
            **found,
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


def measured(experiment: Experiment, folder: Path) -> dict[str, Any] | None:
    """A seed's result, if there is one of these settings."""
    if not (folder / RESULT).exists():
        return None
    result = read_result(folder)
    return result if result.get("settings") == _measuring(experiment) else None


def trained(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    folder: Path,
    each: Each = map,
    watch: Watch | None = None,
) -> tuple[dict[str, AdapterState | None], dict[str, Any]]:
    """Every row's model in this seed's folder, and what was generated; what is finished already is read, not repeated."""

    def train(row: tuple[str, tuple[str, Maker]]) -> tuple[str, Simulated, ServerState]:
        name, (label, maker) = row
        simulated = maker(experiment, dataset, machine, folder / name)
        return label, simulated, simulated.finish(watch.training(label) if watch else Listener())

    rows: dict[str, AdapterState | None] = {"base": None}
    synthesis: dict[str, Any] = {}
    for label, simulated, state in each(train, trainings(experiment).items()):
        rows |= simulated.models(label, state)
        if made := simulated.synthesis():
            synthesis[label] = made
    return rows, synthesis


def unmeasured(experiment: Experiment, folder: Path) -> list[Path]:
    """The seeds' folders that hold no result of these settings."""
    seeds = seed_folders(experiment, folder)
    return [seed for seed, its in seeds.items() if measured(its, seed) is None]


def untrained(experiment: Experiment, folder: Path) -> list[str]:
    """The rows whose training in this seed's folder has not ended."""
    return [
        label
        for name, (label, _) in trainings(experiment).items()
        if len(journal.read(folder / name / METRICS)) <= experiment.rounds
    ]


def read_result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / RESULT).read_text("utf-8"))
    return result


@dataclass(frozen=True)
class Doing:
    """What goes on in one seed."""

    phase: str = ""  # as a Listener hears it
    rounds: Mapping[str, int] = field(default_factory=dict)  # row under way -> the round trained now, from 1
    part: float = 0.0  # of those rounds: the shares of their clients that have answered, summed


@dataclass(frozen=True)
class Progress:
    """Rounds completed so far, over all seeds and rows, and what goes on."""

    rounds: int
    total: int
    finished: int  # seeds
    doing: Mapping[int, Doing]  # of the seeds that are under way


class Stopped(Exception):
    """Ends a thread whose result nobody waits for any more."""


class Watch:
    """Hears what goes on in one seed, from whichever threads it goes on in, until `stop` is set."""

    def __init__(self, stop: Event):
        self._stop = stop
        self._phase = ""
        self._rows: dict[str, tuple[int, float]] = {}  # row -> round from 1, share of its clients

    def phase(self, what: str) -> None:
        self._go_on()
        self._phase = what

    def training(self, row: str) -> Listener:
        return _Row(self, row)

    def tell(self, row: str, round: int, part: float = 0.0) -> None:
        self._go_on()
        self._rows[row] = round, part

    def ended(self, row: str) -> None:
        self._rows.pop(row, None)

    def now(self) -> Doing:
        rows = dict(self._rows)
        rounds = {row: round for row, (round, _) in rows.items()}
        return Doing(self._phase, rounds, sum(part for _, part in rows.values()))

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped


class _Row(Listener):
    """Hears one training of a seed."""

    def __init__(self, watch: Watch, row: str):
        self._watch, self._row, self._rounds = watch, row, 0

    def started(self, *, rounds: int, completed: int, cohort: float) -> None:
        self._rounds = rounds
        self._next(completed)

    def updated(self, round: Round, client: ClientId) -> None:
        answered = len(round.updates) + len(round.refused)
        self._watch.tell(self._row, round.round + 1, answered / max(1, len(round.cohort)))

    def committed(self, record: Mapping[str, Any]) -> None:
        self._next(record["round"])

    def _next(self, completed: int) -> None:
        if completed < self._rounds:
            self._watch.tell(self._row, completed + 1)
        else:
            self._watch.ended(self._row)


def all_seeds(
    experiment: Experiment, folder: Path, datasets: Sequence[Dataset], machine: Machine
) -> Iterator[Progress]:
    """Train and measure every seed on one machine, which is closed at the end; yields progress until all are there.

    Every training under way has a thread of its own here. The machine's workers do what takes time, for earlier seeds
    first. When a seed fails, or this generator is closed, all threads end; what they had committed is gone on with
    next time.
    """
    names = _names(experiment, folder)
    at_once = min(machine.engine.workers, len(names))
    watched: dict[int, Watch] = {}
    stop = Event()
    seeds = ThreadPoolExecutor(at_once)
    rows = ThreadPoolExecutor(at_once * len(trainings(experiment)))

    def each(train: Callable[[T], R], items: Iterable[T]) -> list[R]:
        under_way = [rows.submit(train, item) for item in items]
        for ended in wait(under_way, return_when=FIRST_EXCEPTION).done:
            ended.result()  # raises what a training raised, though an earlier one may go on
        return [one.result() for one in under_way]

    def one(place: int, home: Path, seed: int) -> None:
        watched[seed] = Watch(stop)
        one_seed(
            experiment.with_(seed=seed), datasets[place], machine.ranked(place), home, each, watched[seed]
        )
        del watched[seed]

    work = [seeds.submit(one, place, home, seed) for place, (home, seed) in enumerate(names.items())]
    try:
        going = set(work)
        while going:
            ended, going = wait(going, POLL, FIRST_EXCEPTION)
            for each_one in ended:
                each_one.result()
            yield progress(experiment, folder, {seed: watch.now() for seed, watch in dict(watched).items()})
    finally:
        stop.set()
        machine.close()  # whoever waits for a worker is told
        seeds.shutdown(cancel_futures=True)
        rows.shutdown()


def seed_folders(experiment: Experiment, folder: Path) -> Mapping[Path, Experiment]:
    return {name: experiment.with_(seed=seed) for name, seed in _names(experiment, folder).items()}


def _names(experiment: Experiment, folder: Path) -> dict[Path, int]:
    return {
        folder / files.seed(seed): seed
        for seed in range(experiment.seed, experiment.seed + experiment.compare.seeds)
    }


def progress(experiment: Experiment, folder: Path, doing: Mapping[int, Doing] = {}) -> Progress:
    rounds, finished = 0, 0
    rows, names = list(trainings(experiment)), _names(experiment, folder)
    for seed in names:
        finished += measured(experiment, seed) is not None
        for row in rows:
            rounds += max(0, len(journal.read(seed / row / METRICS)) - 1)
    total = len(rows) * experiment.rounds * experiment.compare.seeds
    return Progress(rounds, total, finished, doing)
