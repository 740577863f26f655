"""What a person sees while a run or a comparison goes on. Plain lines, and not many, where the output is no terminal.

Nothing here needs torch, so that the first word comes before it is there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TimeElapsedColumn
from rich.text import Text

from fedloom.cli.console import counted, duration, err, note, notes, size, warn
from fedloom.experiment.listener import Listener
from fedloom.experiment.settings import Experiment
from fedloom.storage import folders

if TYPE_CHECKING:
    from fedloom.experiment import comparison
    from fedloom.federation import Round
    from fedloom.messages import ClientId

LOADING = "loading the base model"
SELDOM = 30.0  # seconds between two plain lines about the same thing


class Screen:
    """A few lines over a bar, drawn again in place; nothing where the output is no terminal."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[str] = []
        self._bar = Progress(SpinnerColumn(), BarColumn(bar_width=28), TimeElapsedColumn(), console=err)
        self._task: TaskID = self._bar.add_task("", total=None)
        self._live = Live(console=err, transient=True, refresh_per_second=5, get_renderable=self._drawn)

    def _drawn(self) -> Group:
        return Group(
            *(Text(line, no_wrap=True, overflow="ellipsis") for line in self.lines),
            self._bar.get_renderable(),
        )

    def draw(self, *lines: str, done: float = 0.0, total: float | None = None) -> None:
        self.lines = list(lines)
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if kind is KeyboardInterrupt and folders.begun(self.folder):
            note(f"Every committed round is safe. Go on with it: {escape(folders.resume(self.folder))}")


class RunDisplay(Listener):
    """One line a round; on a terminal also a bar with clients, speed and the time left."""

    def __init__(self, experiment: Experiment, screen: Screen):
        self._experiment = experiment
        self._screen = screen
        self._completed = 0
        self._clients = 0.0  # client updates so far in this process
        self._wanted = 1.0  # client updates still to come when it started
        self._tokens = 0
        self._began = time.monotonic()
        self._said: set[str] = set()
        note(f"[bold]{escape(experiment.name)}[/] in {escape(str(screen.folder))}")
        self.phase(LOADING)

    def _draw(self, line: str) -> None:
        total = self._experiment.rounds
        self._screen.draw(line, done=self._completed, total=total if 0 < self._completed < total else None)

    def phase(self, what: str) -> None:
        if what == "training":
            return  # the rounds tell
        self._draw(what)
        if not err.is_terminal and what not in self._said:
            note(what)
        self._said.add(what)

    def started(self, *, rounds: int, completed: int, cohort: float) -> None:
        self._completed = completed
        self._wanted = max(1.0, (rounds - completed) * cohort)
        self._began = time.monotonic()
        if completed:
            note(f"going on after round {completed} of {rounds}")
        self._draw(f"round {min(completed + 1, rounds)} of {rounds}")

    def updated(self, round: Round, client: ClientId) -> None:
        self._clients += 1
        update = round.updates.get(client)
        self._tokens += int(update.metrics.get("tokens", 0)) if update else 0
        spent = time.monotonic() - self._began
        left = spent / self._clients * max(0.0, self._wanted - self._clients)
        answered = len(round.updates) + len(round.refused)
        self._completed = round.round
        self._draw(
            f"round {round.round + 1} of {self._experiment.rounds} · client {answered} of {len(round.cohort)} · "
            f"{duration(left)} left · {self._tokens / max(spent, 1e-9):,.0f} tokens/s"
        )

    def committed(self, record: Mapping[str, Any]) -> None:
        self._completed = record["round"]
        held = record["held_out"]
        parts = [
            f"round {record['round']}/{self._experiment.rounds}",
            f"{len(record['clients'])}/{len(record['cohort'])} clients",
            f"train loss {record['loss']:.3f}" if record["loss"] is not None else "nothing trained",
            *([f"held-out {held['loss']:.3f}"] if held and held["loss"] is not None else []),
            f"{record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s",
            f"up {size(record['bytes_up'])} down {size(record['bytes_down'])}",
            f"{record['seconds']:.1f} s",
        ]
        note(" · ".join(parts))
        for client, code in record["refused"].items():
            self.warned(f"round {record['round']}: {client} was refused ({code})")

    def warned(self, message: str) -> None:
        warn(message)

    def noted(self, messages: Sequence[str]) -> None:
        notes(messages)


class CompareDisplay:
    """What every seed is about; rounds are read from the journals, so any number of processes may write them."""

    def __init__(self, experiment: Experiment, screen: Screen):
        self._seeds = experiment.compare.seeds
        self._rounds = experiment.rounds
        self._screen = screen
        self._start: float | None = None  # rounds that were there when training began here
        self._began = time.monotonic()
        self._spoke = self._began
        self._known: dict[int, tuple[str, str]] | None = None
        self._total = ""
        others = "".join(
            f", {label}" for label in (*experiment.compare.local_labels, *experiment.compare.methods)
        )
        note(
            f"[bold]{escape(experiment.name)}[/]: local-only{escape(others)}, federated and centralised over "
            f"{counted(self._seeds, 'seed')}, in {escape(str(screen.folder))}"
        )
        screen.draw(LOADING)
        if not err.is_terminal:
            note(LOADING)

    def show(self, progress: comparison.Progress) -> None:
        done = progress.rounds + sum(doing.part for doing in progress.doing.values())
        if self._start is None and any(doing.rounds for doing in progress.doing.values()):
            self._start, self._began = done, time.monotonic()
        total = [
            f"{progress.rounds} of {counted(progress.total, 'round')}",
            f"{progress.finished} of {counted(self._seeds, 'seed')} done",
            *self._left(done, progress.total),
        ]
        lines = [f"seed {seed}: {self._told(doing)}" for seed, doing in progress.doing.items()]
        self._screen.draw(*lines or [LOADING], " · ".join(total), done=done, total=progress.total)
        if not err.is_terminal:
            self._speak(progress, " · ".join(total))

    def first(self, summary: Mapping[str, Any]) -> None:
        """The first seed's table, while the others go on: where progress goes, so that the output holds the result alone."""
        from fedloom.cli.display import results_table

        err.print(results_table(summary, err.width))
        note(f"The first seed alone, so without intervals; {counted(self._seeds - 1, 'seed')} to come.")

    def _left(self, done: float, total: int) -> list[str]:
        if self._start is None or done <= self._start or done >= total:
            return []
        return [
            f"about {duration((time.monotonic() - self._began) / (done - self._start) * (total - done))} left"
        ]

    def _told(self, doing: comparison.Doing) -> str:
        if not doing.rounds:
            return doing.phase or LOADING
        rows = doing.rounds.items()
        return "training " + ", ".join(f"{row} (round {round} of {self._rounds})" for row, round in rows)

    def _speak(self, progress: comparison.Progress, total: str) -> None:
        """A line where a seed begins something else, and now and then one about how far all of them are."""
        known = {seed: (doing.phase, ", ".join(doing.rounds)) for seed, doing in progress.doing.items()}
        for seed in (
            seed for seed in known if self._known is not None and known[seed] != self._known.get(seed)
        ):
            note(f"seed {seed}: {self._told(progress.doing[seed])}")
        ended = self._known is not None and not set(self._known) <= set(known)
        if (ended or time.monotonic() - self._spoke > SELDOM) and total != self._total:
            note(total)
            self._spoke, self._total = time.monotonic(), total
        self._known = known
