"""fedloom report: make a run's page again."""

from __future__ import annotations

from fedloom.cli.arguments import RunFolder, load_finished
from fedloom.cli.console import say


def command(run: RunFolder) -> None:
    """Write report.html of a finished run or comparison again."""
    load_finished(run)
    from fedloom.report import page

    say(f"Report: {page.write(run)}")
