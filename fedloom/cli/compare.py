"""fedloom compare: base, local-only, federated and centralised, side by side."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fedloom.cli.arguments import Out, Overrides, Resume, What, experiment_and_folder, stop_on_terminate


def command(
    what: What = "quickstart",
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    jobs: Annotated[int | None, typer.Option(help="Seeds to run at a time. Default: one for each core, one on a GPU.")] = None,
) -> None:
    """The table of the FedIT paper from one command: several seeds, 95% intervals, paired differences."""
    experiment, folder = experiment_and_folder(what, overrides, out, resume)
    stop_on_terminate()
    from fedloom.cli.console import note
    from fedloom.cli.display import CompareDisplay, print_summary
    from fedloom.simulate import compare

    if jobs is None:
        jobs = 1 if _on_gpu(experiment.model.device) else min(os.cpu_count() or 1, experiment.compare.seeds)
    with CompareDisplay(experiment, folder) as display:
        summary = compare(experiment, folder, jobs=jobs, resume=resume, on_progress=display.show, on_notes=note)
    print_summary(summary, folder)


def _on_gpu(device: str) -> bool:
    import torch

    return device in ("cuda", "mps") or (device == "auto" and torch.cuda.is_available())
