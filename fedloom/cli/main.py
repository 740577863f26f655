"""The `fedloom` command: one file a subcommand, each thin: parse, build, call, print."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from fedloom.cli import audit, chat, compare, copy, describe, evaluate, export, judge, partition, report, run
from fedloom.cli.console import complain
from fedloom.errors import FedloomError

INTERRUPTED = 130  # what typer makes of KeyboardInterrupt

app = typer.Typer(
    name="fedloom",
    help="Federated instruction tuning of large language models: many data owners tune one model together "
    "and exchange only small LoRA adapters.",
    epilog="First time here?  fedloom compare quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (run, compare, describe, partition, copy, evaluate, judge, audit, chat, export, report):
    app.command(name=command.__name__.rpartition(".")[2])(command.command)


def main() -> None:
    """Exit codes: 0 done, 1 a bug in fedloom or a failed gate of `fedloom audit`, 2 something the user can mend, 130 interrupted."""
    # Idle OpenMP threads spin by default, which slows everything on shared cores up to twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except FedloomError as error:
        complain(str(error))
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complain("Interrupted. Every committed round is safe; go on with --resume --out and the same folder.")
        raise
    except BrokenPipeError:
        sys.exit(141)
    except OSError as failed:  # a full disk, a missing permission: nothing that a traceback would explain
        complain(f"{failed}. What a run committed before is intact; mend this and go on with --resume.")
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        complain("This is a bug in fedloom, not a mistake of yours. The run's folder is intact and can be resumed.")
        sys.exit(1)
