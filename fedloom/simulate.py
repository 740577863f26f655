"""The two things one does with an experiment, as functions: `run` it, or `compare` its rows.

    from fedloom.config import load
    from fedloom.simulate import run

    summary = run(load("quickstart", ["rounds=4"]), Path("runs/mine"))
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom import checkpoint, durable, journal
from fedloom.compare import (
    Progress,
    all_seeds,
    federated,
    models_of,
    progress,
    read_result,
    seed_folders,
    synthesis_of,
)
from fedloom.config import Experiment, load
from fedloom.engine.models import base_folder
from fedloom.engine.peft_format import export_merged, load_adapter, save_adapter
from fedloom.errors import ConfigError, RunError
from fedloom.experiment import Machine, load_data, load_machine
from fedloom.report import card, page
from fedloom.results import measure, read_summary, summarise, write_json
from fedloom.run import Listener
from fedloom.state import AdapterState


def run(experiment: Experiment, folder: Path, *, resume: bool = False, listener: Listener = Listener()) -> dict[str, Any]:
    """Train, evaluate and export one experiment in `folder`; returns what summary.json holds.

    With `resume`, goes on from the newest committed round; a finished run is only read. However often
    it is interrupted and resumed, the adapter is the same to the bit. Raises: FedloomError.
    """
    with _claimed(folder, experiment, resume=resume):
        finished = _finished(folder)
        if finished is not None:
            return finished
        if any(folder.glob("seed-*/")):
            raise RunError(f"{folder} holds a comparison. Go on with it: fedloom compare --resume --out {folder}")
        dataset = load_data(experiment, quarantine=folder / "quarantine.jsonl")
        listener.noted(dataset.notes)
        machine = load_machine(experiment)
        training = federated(experiment, dataset, machine, folder)
        state = training.finish(listener)
        rows: dict[str, AdapterState | None] = {"base": None, **models_of(training, "federated", state)}
        result = measure(experiment, dataset, machine, rows)
        if made := synthesis_of(training):
            result["synthesis"] = {"federated": made}
        summary = summarise(
            "run", experiment, dataset, [result], records=journal.read(folder / "metrics.jsonl"),
            adapter_sha256=state.adapter.sha256(), engine=machine.describe(),
        )  # fmt: skip
        _export(folder, experiment, state.adapter, summary)
    return summary


def compare(
    experiment: Experiment, folder: Path, *, jobs: int = 1, resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None, on_notes: Callable[[Sequence[str]], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Base, local-only, federated and centralised over `experiment.compare.seeds` seeds, in `folder`.

    `jobs` seeds run at a time, each in a process of its own. Resumes like `run`, seed by seed.
    """
    if not experiment.algorithm.shared:
        raise ConfigError(
            f'algorithm = "{experiment.algorithm.name}" trains no shared model to compare with others. '
            "Choose one that does, and give this one a row: compare.methods."
        )
    with _claimed(folder, experiment, resume=resume):
        finished = _finished(folder)
        if finished is not None:
            return finished
        if (folder / "state").exists():
            raise RunError(f"{folder} holds a run. Go on with it: fedloom run --resume --out {folder}")
        dataset = load_data(experiment)  # before any seed: what is wrong with the data is told at once
        on_notes(dataset.notes)
        on_progress(progress(experiment, folder))
        for state in all_seeds(experiment, folder, jobs=jobs):
            on_progress(state)
        seeds = seed_folders(experiment, folder)
        results = [read_result(seed) for seed in seeds]
        first = next(iter(seeds))
        found = checkpoint.newest(first / "federated" / "state", fingerprint=seeds[first].fingerprint()).checkpoint
        if found is None:
            raise RunError(f"{first / 'federated'} holds no committed round any more; start again with another --out.")
        adapter = found.state.adapter
        summary = summarise(
            "compare", experiment, dataset, results, records=journal.read(first / "federated" / "metrics.jsonl"),
            adapter_sha256=adapter.sha256(), engine=results[0]["engine"],
        )  # fmt: skip
        _export(folder, experiment, adapter, summary)
    return summary


def evaluate(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Measure a finished run's adapter beside the base, on the held-out part of `experiment`'s data."""
    dataset, machine = load_data(experiment), load_machine(experiment)
    adapter = adapter_of(folder, machine)
    result = measure(experiment, dataset, machine, {"base": None, "federated": adapter})
    write_json(folder / "evaluation.json", {**result, "experiment": experiment.plain(), "adapter_sha256": adapter.sha256()})
    return result


def adapter_of(folder: Path, machine: Machine) -> AdapterState:
    """The exported adapter of a run, checked against the base model it is to run on."""
    if not (folder / "adapter").is_dir():
        raise RunError(f"{folder} has no adapter yet. Finish it first: fedloom run --resume --out {folder}")
    state, _ = load_adapter(folder / "adapter")
    machine.engine.layout.to_vector(state)  # raises where names or shapes do not fit this model
    return state


def export(run: Path, folder: Path, *, merged: bool) -> None:
    """The run's model for other tools: its PEFT adapter, or base and adapter merged into a plain model."""
    experiment = load(run)
    if folder.exists():
        raise RunError(f"{folder} exists already and is left as it is. Choose another --out.")
    machine = load_machine(experiment)
    adapter = adapter_of(run, machine)
    if merged:
        export_merged(machine.engine.model, machine.tokenizer, adapter, machine.engine.layout, folder)
    else:
        shutil.copytree(run / "adapter", folder)


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary, if there is one; the page, which comes after it, is made if a crash came between."""
    summary = read_summary(folder)
    if summary is not None and not (folder / "report.html").exists():
        page.write(folder)
    return summary


def _base_name(experiment: Experiment) -> str:
    """Where PEFT finds the base: for the embedded one, the folder it has in this installation."""
    return str(base_folder("embedded")) if experiment.model.base == "embedded" else experiment.model.base


@contextmanager
def _claimed(folder: Path, experiment: Experiment, *, resume: bool) -> Iterator[None]:
    """Hold the folder against other processes, for this experiment and no other."""
    saved = folder / "experiment.toml"
    if resume and not saved.exists():
        raise RunError(f"Nothing to resume: there is no {saved}.")
    with checkpoint.lock(folder):
        if not resume:
            # A run that ended before its first round, say for want of its data, may be started over.
            if saved.exists() and any(folder.rglob("metrics.jsonl")):
                raise RunError(f"{folder} already holds a run. Go on with it by --resume, or choose another --out.")
            durable.write(saved, experiment.to_toml().encode())
        elif load(saved).fingerprint() != experiment.fingerprint():
            raise RunError(f"{folder} holds another experiment: {saved} differs. Resume that one, or choose another --out.")
        yield


def _export(folder: Path, experiment: Experiment, adapter: AdapterState, summary: Mapping[str, Any]) -> None:
    """The adapter, then the summary, which marks the run as finished, then the page made of it."""
    save_adapter(
        folder / "adapter", adapter, experiment.adapter, base_name=_base_name(experiment),
        card=card.model_card(summary), fan_in_fan_out=summary["engine"]["conv1d"],
    )  # fmt: skip
    durable.sync_folder(folder / "adapter")
    write_json(folder / "summary.json", summary)
    page.write(folder)
