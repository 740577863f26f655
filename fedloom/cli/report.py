"""fedloom report: rebuild a run's page."""

from __future__ import annotations

from fedloom.cli.arguments import RunFolder, load_finished
from fedloom.cli.console import say


def command(run: RunFolder) -> None:
    """Rebuild report.html of a finished run or comparison."""
    load_finished(run)
    from fedloom.report import page

    say(f"Report: {page.write(run)}")
