"""Open a finished run: its settings, with changes if any are given, and its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError, ModelError, RunError
from fedloom.experiment import toml
from fedloom.experiment.settings import Experiment
from fedloom.storage import files, folders

if TYPE_CHECKING:  # settings are read, and their mistakes reported, without waiting for torch
    from fedloom.experiment.machine import Machine
    from fedloom.state import AdapterState


def finished(run: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run whose training has ended. Raises: RunError, ConfigError."""
    folders.expect_run(run, recipes=toml.recipes())
    saved = toml.load_run(run)
    folders.expect_finished(run, rounds=saved.rounds, seeds=saved.compare.seeds)
    return toml.load_run(run, overrides) if overrides else saved


def adapter_of(folder: Path, machine: Machine) -> AdapterState:
    """A run's exported adapter. Raises where the base model or the LoRA scale is not the training's."""
    from fedloom.engine.export_files import recorded_base
    from fedloom.engine.peft_format import load_adapter

    home = folder / files.ADAPTER
    if not home.is_dir():
        raise RunError(f"{folder} has no adapter yet. Finish it first: fedloom run --resume --out {folder}")
    state, spec = load_adapter(home)
    summary = files.read_summary(folder)
    recorded = recorded_base(home) or (summary and summary["engine"]["base_sha256"])
    if recorded and not machine.is_base(recorded):
        raise ModelError(
            f"The adapter of {folder} was trained on another base model (sha256 {recorded[:16]}…) than the one found now "
            f"({machine.base_sha256[:16]}…). Put the old base back, or say where it is: model.base=FOLDER."
        )
    machine.layout.to_vector(state)  # raises where names or shapes do not fit this model
    if spec.scale != machine.layout.spec.scale:
        raise ConfigError(
            f"The adapter of {folder} was trained with a scale of {spec.scale:g}, and these settings scale it by "
            f"{machine.layout.spec.scale:g}. Leave adapter.alpha, adapter.rank and adapter.rslora as they are."
        )
    return state
