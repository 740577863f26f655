"""fedloom compare: base, local-only, federated and centralised, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom.cli.arguments import Out, Overrides, Resume, What, experiment_and_folder, stop_on_terminate
from fedloom.cli.console import notes
from fedloom.cli.judge import judge_and_print


def command(
    what: What = "quickstart",
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Let a judge's endpoint be asked although it costs money, or nobody knows how much."
        ),
    ] = False,
) -> None:
    """The table of the FedIT paper from one command: several seeds, 95% intervals, paired differences."""
    experiment, folder = experiment_and_folder(what, overrides, out, resume, kind="compare")
    stop_on_terminate()
    from fedloom.cli.progress import CompareDisplay, Screen

    with Screen(folder) as screen:
        display = CompareDisplay(experiment, screen)
        from fedloom.cli.display import print_summary  # only now, since torch comes with it
        from fedloom.experiment.commands import compare

        summary = compare(
            experiment,
            folder,
            resume=resume,
            on_progress=display.show,
            on_notes=notes,
            on_first=display.first,
        )
    print_summary(summary, folder)
    if experiment.judge is not None:
        judge_and_print(folder, experiment, yes=yes)
