"""fedloom report: make a run's page again."""

from __future__ import annotations

from fedloom.cli.arguments import RunFolder
from fedloom.cli.console import out


def command(run: RunFolder) -> None:
    """Write report.html of a finished run or comparison again."""
    from fedloom.report import page

    out.print(f"Report: {page.write(run)}", highlight=False, soft_wrap=True)
