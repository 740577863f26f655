"""fedloom export: a run's model in a form that other tools load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.arguments import Overrides, RunFolder
from fedloom.cli.console import out


class Form(StrEnum):
    peft = "peft"
    merged = "merged"
    tensorboard = "tensorboard"


def command(
    run: RunFolder,
    overrides: Overrides = None,
    to: Annotated[Form, typer.Option("--to", help="peft: the adapter alone. merged: base and adapter as one model. tensorboard: the curves.")] = Form.peft,
    where: Annotated[Path | None, typer.Option("--out", help="Folder to write. Default: RUN/export-FORM.")] = None,
) -> None:
    """Write the tuned model for PEFT and vLLM, as a plain transformers model, or the curves for TensorBoard.

    Tokenizer, chat template and stop tokens come with it. Settings that decide no training may be changed:
    fedloom export RUN --to merged model.base=FOLDER
    """
    from fedloom import simulate, tensorboard

    folder = where or run / f"export-{to.value}"
    if to is Form.tensorboard:
        tensorboard.export(run, folder)
    else:
        simulate.export(run, folder, merged=to is Form.merged, overrides=overrides or [])
    out.print(f"Wrote {folder}", highlight=False, soft_wrap=True)
