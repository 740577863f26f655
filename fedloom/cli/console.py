"""Where commands print: results to standard output, complaints and progress to standard error."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

# No markup and no emoji codes in results: "[b]" or ":cat:" in a path or an answer is meant literally.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, emoji=False, highlight=False)


def say(line: str) -> None:
    """Print a line of the result, never wrapped: it may be a path."""
    out.print(line, soft_wrap=True)


def note(line: str) -> None:
    """Print a line about progress, in rich's markup."""
    err.print(line, soft_wrap=True)


def complain(message: str) -> None:
    note(f"[bold red]fedloom:[/] {escape(message)}")


def warn(message: str) -> None:
    note(f"[yellow]warning:[/] {escape(message)}")


def notes(messages: Sequence[str]) -> None:
    """Print the data reader's notes, one per line."""
    for message in messages:
        note(f"[yellow]data:[/] {escape(message)}")


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(count: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
