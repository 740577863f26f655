"""fedloom run: train, evaluate and export one experiment."""

from __future__ import annotations

from fedloom.cli.arguments import Out, Overrides, Resume, What, experiment_and_folder, stop_on_terminate


def command(what: What = "quickstart", overrides: Overrides = None, out: Out = None, resume: Resume = False) -> None:
    """Train one experiment: every round committed, resumable after any crash.

    Ends with the adapter in PEFT's format, summary.json and report.html in the run's folder.
    """
    experiment, folder = experiment_and_folder(what, overrides, out, resume)
    stop_on_terminate()
    from fedloom.cli.display import RunDisplay, print_summary
    from fedloom.simulate import run

    with RunDisplay(experiment, folder) as display:
        summary = run(experiment, folder, resume=resume, listener=display)
    print_summary(summary, folder)
