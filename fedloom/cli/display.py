"""What a person sees while a run goes on, and at its end. Plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from fedloom.cli.console import duration, err, note, out, size
from fedloom.config import Experiment
from fedloom.federation import Round
from fedloom.messages import ClientId
from fedloom.report import findings
from fedloom.results import model_of
from fedloom.run import Listener

TITLES = {
    "rule": "rule ↑", "rouge_l": "ROUGE-L ↑", "exact": "exact ↑", "loss": "loss ↓",
    "exposure": "exposure ↓\nbits", "extraction": "extraction ↓\nROUGE-L", "auc": "membership ↓\nAUC",
}  # fmt: skip
DROPPED_FIRST = ("auc", "exact", "rouge_l", "extraction", "loss", "exposure", "rule")  # where a terminal is narrow
ORDER = ("rule", "rouge_l", "exact", "loss")
BESIDE_LEAKAGE = 2  # metrics of quality that a terminal has room for where leakage is shown, too


class RunDisplay(Listener):
    """One line a round; on a terminal also a bar with clients, speed, traffic and the time left."""

    def __init__(self, experiment: Experiment, folder: Path):
        self._experiment = experiment
        self._folder = folder
        self._live = err.is_terminal
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), console=err, transient=True,
        )  # fmt: skip
        self._clients = 0.0  # client updates so far in this process
        self._wanted = 0.0  # client updates still to come when it started
        self._tokens = 0
        self._up = self._down = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        err.print(f"[bold]{self._experiment.name}[/] in {self._folder}", highlight=False, soft_wrap=True)
        if self._live:
            self._bar.start()
            self._task = self._bar.add_task("loading", total=None, detail="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def started(self, *, rounds: int, completed: int, cohort: float) -> None:
        self._wanted = max(1.0, (rounds - completed) * cohort)
        self._began = time.monotonic()
        if completed:
            err.print(f"going on after round {completed} of {rounds}", highlight=False)
        if self._live:
            self._bar.update(self._task, description="round", total=rounds, completed=completed)

    def updated(self, round: Round, client: ClientId) -> None:
        self._clients += 1
        update = round.updates.get(client)
        self._tokens += int(update.metrics.get("tokens", 0)) if update else 0
        if self._live:
            spent = time.monotonic() - self._began
            left = spent / self._clients * max(0.0, self._wanted - self._clients)
            answered = len(round.updates) + len(round.refused)
            detail = f"client {answered}/{len(round.cohort)} · {self._tokens / max(spent, 1e-9):,.0f} tokens/s · {duration(left)} left"
            self._bar.update(self._task, detail=detail)

    def committed(self, record: Mapping[str, Any]) -> None:
        self._up += record["bytes_up"]
        self._down += record["bytes_down"]
        if self._live:
            self._bar.update(self._task, completed=record["round"])
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
        err.print(" · ".join(parts), highlight=False, soft_wrap=True)
        for client, code in record["refused"].items():
            self.warned(f"round {record['round']}: {client} was refused ({code})")

    def noted(self, messages: Sequence[str]) -> None:
        note(messages)

    def warned(self, message: str) -> None:
        err.print(f"[yellow]warning:[/] {message}", highlight=False, soft_wrap=True)


class CompareDisplay:
    """Rounds over all seeds and rows; read from the journals, so any number of processes may write them."""

    def __init__(self, experiment: Experiment, folder: Path):
        self._experiment = experiment
        self._folder = folder
        self._live = err.is_terminal
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(),
            TextColumn("rounds · {task.fields[detail]}"), TimeElapsedColumn(), console=err, transient=True,
        )  # fmt: skip
        self._began = time.monotonic()
        self._start: int | None = None
        self._said = -1

    def __enter__(self) -> Self:
        e = self._experiment
        others = "".join(f", {escape(label)}" for label in e.compare.methods)
        err.print(f"[bold]{e.name}[/]: local-only{others}, federated and centralised over {e.compare.seeds} seeds, in {self._folder}",
                  highlight=False, soft_wrap=True)  # fmt: skip
        if self._live:
            self._bar.start()
            self._task = self._bar.add_task("comparing", total=None, detail="loading")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def show(self, progress: Any) -> None:
        if self._start is None:
            self._start = progress.rounds
        spent, done = time.monotonic() - self._began, progress.rounds - self._start
        left = f"about {duration(spent / done * (progress.total - progress.rounds))} left" if done else "starting"
        if self._live:
            self._bar.update(self._task, completed=progress.rounds, total=progress.total, detail=f"{progress.latest} · {left}")
        elif progress.finished != self._said:
            err.print(f"{progress.finished} of {self._experiment.compare.seeds} seeds done · {left}", highlight=False)
        self._said = progress.finished


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The result table, what its differences show, and where everything lies."""
    out.print(results_table(summary, out.width))
    for line in differences(summary):
        out.print(escape(line), highlight=False, soft_wrap=True)
    out.print(f"Report:  {folder / 'report.html'}", highlight=False, soft_wrap=True)
    out.print(f"Adapter: {folder / 'adapter'}  (try: fedloom chat {folder})", highlight=False, soft_wrap=True)


def results_table(summary: Mapping[str, Any], width: int) -> Table:
    """Every named row, and as many metrics as fit into `width`; a method's best clients are left to the page."""
    leaks = findings.leaks(summary)
    quality = [m for m in findings.metrics(summary) if m in ORDER]
    shown = [*(quality[:BESIDE_LEAKAGE] if leaks else quality), *leaks]
    table = _results_table(summary, shown)
    while len(shown) > 2 and out.measure(table, options=out.options.update(width=1000)).maximum > width:
        shown.remove(next(m for m in DROPPED_FIRST if m in shown))
        table = _results_table(summary, shown)
    return table


def _results_table(summary: Mapping[str, Any], shown: Sequence[str]) -> Table:
    seeds = len(findings.seeds(summary))
    table = Table(title=f"{summary['name']}: held-out examples, {seeds} seed{'s' if seeds > 1 else ''}"
                  + (", mean ± 95% interval" if seeds > 1 else ""), title_justify="left")  # fmt: skip
    table.add_column("row", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for metric in shown:
        table.add_column(TITLES[metric], justify="right", no_wrap=True)
    own = findings.own(summary)
    for name in _named(summary) or findings.single_clients(summary):
        entries = [findings.entry(summary, name, m) for m in shown]
        cells = ["-" if e is None else f"{findings.value(e['metric'], e['mean'])} {findings.half_width(e['metric'], e['ci95'])}".strip() for e in entries]
        title = f"federated ({own})" if name == "federated" else escape(name)
        table.add_row(title, model_of(name), *cells, style="bold" if name == "federated" else "")
    return table


def _named(summary: Mapping[str, Any]) -> list[str]:
    """Without the best clients of methods, which are chosen with hindsight."""
    bests = {f"{label} best" for label in findings.methods(summary)} | {f"{label} personal best" for label in findings.methods(summary)}
    return [row for row in findings.rows(summary) if row not in bests]


def differences(summary: Mapping[str, Any]) -> list[str]:
    """One plain sentence for each comparison of the federated row, in the first metric there is; in exposure with FedIT."""
    metric = findings.main_metric(summary)
    fedit = [label for label, its in findings.methods(summary).items() if its["name"] == "fedavg"]
    wanted = {(row, metric) for row in _named(summary)} | {(row, leak) for row in fedit for leak in findings.leaks(summary)[:1]}
    lines = []
    for d in summary["differences"]:
        other = d["a"] if d["b"] == "federated" else d["b"]
        if d["ci95"] is None or "federated" not in (d["a"], d["b"]) or (other, d["metric"]) not in wanted:
            continue
        low, high = d["ci95"]
        clear = "the interval excludes zero" if low > 0 or high < 0 else "the interval includes zero"
        unit = "bits of exposure" if d["metric"] == "exposure" else d["metric"]
        lines.append(f"{d['a']} − {d['b']}: {d['mean']:+.3f} {unit} (95% interval {low:+.3f} to {high:+.3f}; {clear})")
    return lines


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    metrics: Sequence[str] = [m for m in ORDER if all(m in found for found in rows.values())]
    table = Table()
    table.add_column("row")
    for metric in metrics:
        table.add_column(TITLES[metric], justify="right")
    for name, found in rows.items():
        table.add_row(name, *(findings.value(m, found[m]) for m in metrics))
    return table
