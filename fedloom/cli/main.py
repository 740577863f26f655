"""The `fedloom` command: one file a subcommand, each thin: parse, build, call, print."""

from __future__ import annotations

import io
import os
import platform
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from fedloom.cli import (
    audit,
    chat,
    compare,
    copy,
    describe,
    evaluate,
    export,
    judge,
    partition,
    recipes,
    report,
    run,
)
from fedloom.cli.console import complain, say
from fedloom.errors import FedloomError

INTERRUPTED = 130  # typer's exception for KeyboardInterrupt

app = typer.Typer(
    name="fedloom",
    help="Federated instruction tuning of large language models: many data owners tune one model together "
    "and exchange only small LoRA adapters.",
    epilog="First time here?  fedloom compare quickstart",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (
    run,
    compare,
    recipes,
    describe,
    partition,
    copy,
    evaluate,
    judge,
    audit,
    chat,
    export,
    report,
):
    app.command(name=command.__name__.rpartition(".")[2])(command.command)


def _version(wanted: bool) -> None:
    if wanted:
        say(
            f"fedloom {version('fedloom')} (Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')})"
        )
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Exit codes: 0 done, 1 a bug or a failed audit gate, 2 something the user can fix, 130 interrupted."""
    # Idle OpenMP threads spin by default, which can slow shared cores down twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a character the terminal cannot show is no reason to stop
    try:
        app()
    except FedloomError as error:
        complain(str(error))
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complain("Interrupted.")
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains too
        sys.exit(141)
    except OSError as failed:  # a full disk, a missing permission: a traceback would not help
        complain(f"{failed}. Rounds committed earlier are intact; correct this and go on with --resume.")
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        complain(
            "This is a bug in fedloom, not a mistake of yours. The run's folder is intact and can be resumed."
        )
        sys.exit(1)
