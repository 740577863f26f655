"""fedloom export: a run's model in a form that other tools load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import say
from fedloom.errors import RunError


class Form(StrEnum):
    peft = "peft"
    merged = "merged"
    tensorboard = "tensorboard"


def command(
    run: RunFolder,
    overrides: Overrides = None,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="peft: the adapter alone. merged: base and adapter as one model. tensorboard: the curves.",
        ),
    ] = Form.peft,
    where: Annotated[
        Path | None, typer.Option("--out", help="Folder to write. Default: RUN/export-FORM.")
    ] = None,
) -> None:
    """Write the tuned model for PEFT and vLLM, as a plain transformers model, or the curves for TensorBoard.

    Tokenizer, chat template and stop tokens come with it. Settings that do not affect training may change:
    fedloom export RUN --to merged model.base=FOLDER
    """
    folder = where or run / f"export-{to.value}"
    load_finished(run, overrides)
    if to is not Form.tensorboard and folder.exists():
        raise RunError(f"{folder} exists already and is left as it is. Choose another --out.")
    from fedloom.experiment import commands
    from fedloom.report import tensorboard

    if to is Form.tensorboard:
        tensorboard.export(run, folder)
    else:
        commands.export(run, folder, merged=to is Form.merged, overrides=overrides or [])
    say(f"Wrote {folder}")
