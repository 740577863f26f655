"""Where commands print: results to standard output, complaints and progress to standard error."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def complain(message: str) -> None:
    err.print(f"[bold red]fedloom:[/] {escape(message)}", highlight=False, soft_wrap=True)


def note(messages: Sequence[str]) -> None:
    """What the data's reader has to say, a line each."""
    for message in messages:
        err.print(f"[yellow]data:[/] {escape(message)}", highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError(count)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
