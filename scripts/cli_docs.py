"""Write docs/cli.md from the command line itself.

    python scripts/cli_docs.py

tests/test_docs.py fails when the page no longer says what `fedloom --help` would.
"""

from __future__ import annotations

import inspect
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from fedloom.cli.main import app
from fedloom.cli.recipes import about
from fedloom.experiment.toml import recipes

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Commands

Made by `scripts/cli_docs.py` from the command line itself.

Exit codes: 0 done, 1 a bug in fedloom or a failed gate of `fedloom audit`, 2 something you can mend (the message says what),
130 interrupted.
Results go to standard output, progress and complaints to standard error.
"""


def page() -> str:
    shipped = "".join(f"| `{name}` | {' | '.join(about(text))} |\n" for name, text in recipes().items())
    commands = "\n".join(_command(str(info.name), info.callback) for info in app.registered_commands)
    return (
        f"{HEAD}\n## Recipes\n\n| recipe | shows | takes | needs |\n|---|---|---|---|\n{shipped}\n{commands}"
    )


def _command(name: str, function: Any) -> str:
    arguments, rows = [], []
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])
        default = parameter.default
        shown = default not in (inspect.Parameter.empty, None, False) and "Default" not in info.help
        told = info.help + (f" Default: {default}." if shown else "")
        if isinstance(info, typer.models.ArgumentInfo):
            named = info.metavar or parameter.name.upper()
            arguments.append(named if default is inspect.Parameter.empty or named[0] == "[" else f"[{named}]")
            rows.append((f"`{named}`", told))
        else:
            spelt = [d for d in (info.default, *(info.param_decls or ())) if str(d).startswith("--")]
            flag = spelt[0] if spelt else f"--{parameter.name.replace('_', '-')}"
            rows.append((f"`{flag}{_value(kind)}`", told))
    usage = " ".join(["fedloom", name, *arguments, "[OPTIONS]"])
    table = "".join(f"| {left.replace('|', chr(92) + '|')} | {right} |\n" for left, right in rows)
    return f"## fedloom {name}\n\n    {usage}\n\n{inspect.getdoc(function)}\n\n| | |\n|---|---|\n{table}"


def _value(kind: Any) -> str:
    """What an option takes, in the words of the help page."""
    [kind] = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
    if kind is bool:
        return ""
    if issubclass(kind, Enum):
        return f" {'|'.join(str(member.value) for member in kind)}"
    return {Path: " PATH", int: " NUMBER", float: " NUMBER"}.get(kind, " TEXT")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
