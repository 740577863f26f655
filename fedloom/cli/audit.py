"""fedloom audit: what a run leaks to whom, and a gate for its release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import complain, note, out, say

if TYPE_CHECKING:
    from rich.table import Table

    from fedloom.report.readings import Line


class On(StrEnum):
    bound = "bound"
    estimate = "estimate"


def command(
    run: RunFolder,
    overrides: Overrides = None,
    max_exposure: Annotated[
        float | None, typer.Option(help="Release gate: bits known of a planted canary, on average.")
    ] = None,
    max_auc: Annotated[
        float | None,
        typer.Option(help="Release gate: AUC of the best membership attack, less the untuned base's."),
    ] = None,
    max_extraction: Annotated[
        float | None,
        typer.Option(
            help="Release gate: ROUGE-L of extracted answers beyond the base and beyond held-out prompts."
        ),
    ] = None,
    max_recall: Annotated[
        float | None,
        typer.Option(help="Release gate: share of a client's tokens that the server reads from its upload."),
    ] = None,
    gate_on: Annotated[
        On,
        typer.Option(
            help="Compare limits with the upper end of a figure's 95% interval, or with its estimate."
        ),
    ] = On.bound,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Unprompted samples to draw from the model. Default: 64, or 1024 with --full."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Add greedy continuations and draw more samples: slower.")
    ] = False,
) -> None:
    """Attack a finished run as anyone with its adapter, as another client and as the server.

    Every figure stands beside that of the untuned base or of unseen secrets. Exits with 1 if a figure exceeds
    its limit, could not be measured, or rests on too few records. Needs the data the run was trained on.
    """
    load_finished(run)
    from fedloom.attacks.release import Limits
    from fedloom.experiment.audit import FULL, SAMPLES, audit
    from fedloom.report import readings
    from fedloom.storage.files import AUDIT, REPORT

    limits = Limits(
        exposure=max_exposure, auc=max_auc, extraction=max_extraction, recall=max_recall, on=gate_on.value
    )
    found = audit(
        run,
        overrides or [],
        limits=limits,
        full=full,
        samples=samples or (FULL if full else SAMPLES),
        say=lambda part: note(f"[dim]auditing: {part}[/]"),
    )
    out.print(_table(found["name"], readings.lines(found)))
    say(f"Wrote {run / AUDIT} and {run / REPORT}")
    told = readings.gate(found)
    for limit in told:
        if limit.passed:
            say(limit.text)
    for limit in told:
        if not limit.passed:
            complain(limit.text)
    if found["passed"] is False:
        raise typer.Exit(1)
    if found["passed"]:
        say("Every limit is kept. This is no proof of privacy: stronger attacks exist.")


def _table(name: str, groups: Mapping[str, Sequence[Line]]) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: what it leaks", title_justify="left")
    for head in ("measure", "released", "control", "95% interval"):
        table.add_column(head, justify="left" if head in ("measure", "control") else "right")
    table.add_column("reading", min_width=12)
    for position, lines in groups.items():
        table.add_row(position, style="bold")
        for line in lines:
            table.add_row(line.measure, line.found, line.control, line.interval, line.reading)
        table.add_section()
    return table
