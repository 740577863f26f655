"""fedloom run: train, evaluate and export one experiment."""

from __future__ import annotations

from fedloom.cli.arguments import Out, Overrides, Resume, What, experiment_and_folder, stop_on_terminate


def command(
    what: What = "quickstart", overrides: Overrides = None, out: Out = None, resume: Resume = False
) -> None:
    """Train one experiment: every round committed, resumable after any crash.

    Leaves the adapter in PEFT's format, summary.json and report.html in the run's folder.
    """
    experiment, folder = experiment_and_folder(what, overrides, out, resume, kind="run")
    stop_on_terminate()
    from fedloom.cli.progress import RunDisplay, Screen

    with Screen(folder) as screen:
        display = RunDisplay(experiment, screen)
        from fedloom.cli.display import print_summary  # only now, since torch comes with it
        from fedloom.experiment.commands import run

        summary = run(experiment, folder, resume=resume, listener=display)
    print_summary(summary, folder)
