"""The functions behind the commands: run an experiment, compare its rows, evaluate and export the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedloom.data.prompt_form import chat_template
from fedloom.engine.export_files import ExportFiles
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.models import base_folder
from fedloom.engine.peft_format import export_merged, save_adapter
from fedloom.errors import ConfigError, RunError
from fedloom.evaluation.cache import Cache
from fedloom.experiment import preflight, questions
from fedloom.experiment.comparison import (
    Progress,
    all_seeds,
    measured,
    measuring,
    progress,
    read_result,
    seed_folders,
    unmeasured,
)
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.finished import adapter_of
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine, Skeleton, load_here, load_machine, load_skeleton, load_workers
from fedloom.experiment.measure import measure
from fedloom.experiment.settings import ALGORITHM, UNTRAINED, Experiment, changed
from fedloom.experiment.simulation import batches, federated, trainings
from fedloom.experiment.summary import summarise
from fedloom.experiment.toml import load_run, recorded
from fedloom.report import card, endings, page
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, durable, files, folders, journal
from fedloom.storage.files import (
    ADAPTER,
    ANSWERS,
    EXPERIMENT,
    INPUTS,
    METRICS,
    QUARANTINE,
    STATE,
    SUMMARY,
    read_summary,
    write_json,
)


def run(
    experiment: Experiment, folder: Path | str, *, resume: bool = False, listener: Listener = Listener()
) -> dict[str, Any]:
    """Train, evaluate and export one experiment in `folder`; returns the contents of summary.json.

    With `resume`, continues from the newest committed round; a finished run is only read. The adapter is
    bit-identical however often the run is interrupted and resumed. Raises: FedloomError.
    """
    folder, experiment = Path(folder), experiment.anchored()
    with _claimed(folder, experiment, resume=resume):
        finished = _finished(folder, experiment)
        if finished is not None:
            return finished
        folders.expect_kind(folder, "run")
        listener.phase("reading the data")
        dataset = load_data(experiment, quarantine=folder / QUARANTINE)
        listener.noted(dataset.notes)
        _checked(experiment, folder, [dataset], compared=False)
        listener.phase("loading the base model")
        with load_machine(experiment, batches=batches(experiment, dataset)) as machine:
            if not machine.facts.end_reachable:
                listener.warned(endings.unreachable(machine.template.end_text))
            simulated = federated(experiment, dataset, machine, folder)
            state = simulated.finish(listener)
            conv1d = bool(machine.describe()["conv1d"])
            _save(
                folder / ADAPTER,
                experiment,
                machine,
                state.adapter,
                machine.base_sha256,
                conv1d,
                card.unmeasured(experiment.name),
            )
            rows: dict[str, AdapterState | None] = {"base": None, **simulated.models("federated", state)}
            with measuring(folder, "run"):
                result = measure(
                    experiment, dataset, machine, rows, cache=Cache(folder / ANSWERS), say=listener.phase
                )
            if made := simulated.synthesis():
                result["synthesis"] = {"federated": made}
            summary = summarise(
                "run",
                experiment,
                dataset,
                [result],
                records=journal.read(folder / METRICS),
                adapter_sha256=state.adapter.sha256(),
                engine=machine.describe(),
                when=_when(folder),
            )
        _finish(folder, summary)
    return summary


def compare(
    experiment: Experiment,
    folder: Path | str,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_notes: Callable[[Sequence[str]], None] = lambda _: None,
    on_first: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Base, local-only, federated and centralised over `experiment.compare.seeds` seeds, in `folder`.

    Seeds and rows train side by side, on as many workers as [machine] says; earlier seeds come first, and `on_first`
    hears the first one's summary while others go on. Resumes like `run`, training by training.
    """
    if not experiment.algorithm.shared:
        raise ConfigError(
            f'algorithm = "{ALGORITHM.name(experiment.algorithm)}" trains no shared model to compare with the others. '
            "Choose one that does, and give this one a row of its own in compare.methods."
        )
    folder, experiment = Path(folder), experiment.anchored()
    with _claimed(folder, experiment, resume=resume):
        finished = _finished(folder, experiment)
        if finished is not None:
            return finished
        folders.expect_kind(folder, "compare")
        seeds = seed_folders(experiment, folder)
        datasets = [load_data(its, quarantine=seed / "quarantine.jsonl") for seed, its in seeds.items()]
        on_notes(datasets[0].notes)
        base = _checked(experiment, folder, datasets, compared=True)
        on_progress(progress(experiment, folder))
        first = next(iter(seeds))

        def summary_of(results: Sequence[Mapping[str, Any]], exported: AdapterState) -> dict[str, Any]:
            return summarise(
                "compare",
                experiment,
                datasets[0],
                results,
                records=journal.read(first / files.FEDERATED / METRICS),
                adapter_sha256=exported.sha256(),
                engine=results[0]["engine"],
                when=_when(folder),
            )

        exported: AdapterState | None = None
        told = len(seeds) == 1
        try:
            for state in _seeds(experiment, folder, datasets):
                exported = exported or _export_first(folder, seeds, base)
                on_progress(state)
                if not told and exported and state.finished < len(seeds):
                    result = measured(seeds[first], first)
                    if told := result is not None:
                        on_first(summary_of([result], exported))
        finally:  # even where a seed could not be measured
            exported = exported or _export_first(folder, seeds, base)
        if exported is None:
            raise RunError(
                f"{first / 'federated'} holds no committed round any more; start again with another --out."
            )
        summary = summary_of([read_result(seed) for seed in seeds], exported)
        _finish(folder, summary)
    return summary


def _seeds(experiment: Experiment, folder: Path, datasets: Sequence[Dataset]) -> Iterator[Progress]:
    """Train and measure what is missing. Where nothing is missing, no base model is loaded."""
    missing = unmeasured(experiment, folder)
    if not missing:
        yield progress(experiment, folder)
        return
    machine = load_workers(experiment, batches=len(missing) * len(trainings(experiment)))
    yield from all_seeds(experiment, folder, datasets, machine)


def _export_first(folder: Path, seeds: Mapping[Path, Experiment], base: Skeleton) -> AdapterState | None:
    """Export a comparison's product, its first seed's federated adapter, once trained; None before."""
    first, experiment = next(iter(seeds.items()))
    home = first / files.FEDERATED
    if len(journal.read(home / METRICS)) <= experiment.rounds:
        return None
    found = checkpoint.newest(home / STATE, fingerprint=experiment.fingerprint()).checkpoint
    if found is None or found.state.round < experiment.rounds:
        return None
    sha256 = json.loads((home / INPUTS).read_bytes())["base_sha256"]
    conv1d = any(t.kind == "conv1d" for t in AdapterLayout.of(base.model, experiment.adapter))
    _save(
        folder / ADAPTER,
        experiment,
        base,
        found.state.adapter,
        sha256,
        conv1d,
        card.unmeasured(experiment.name),
    )
    return found.state.adapter


def evaluate(experiment: Experiment, folder: Path | str) -> dict[str, Any]:
    """Measure a finished run's adapter beside the base, on the held-out part of `experiment`'s data."""
    folder = Path(folder)
    dataset = load_data(experiment)
    preflight.check_examples(
        experiment, load_skeleton(experiment), dataset.test, preflight.asked(experiment, dataset)
    )
    with load_machine(experiment) as machine:
        adapter = adapter_of(folder, machine)
        result = measure(
            experiment, dataset, machine, {"base": None, "federated": adapter}, cache=Cache(folder / ANSWERS)
        )
    write_json(
        folder / files.EVALUATION,
        {**result, "experiment": experiment.plain(), "adapter_sha256": adapter.sha256()},
    )
    return result


def export(
    run: Path | str, folder: Path | str, *, merged: bool = False, overrides: Sequence[str] = ()
) -> None:
    """The run's model for other tools: its PEFT adapter, or base and adapter merged into a plain model.

    `overrides` may change settings that do not affect training, such as the device or where the base is
    stored.
    """
    run, folder = Path(run), Path(folder)
    saved, experiment = load_run(run), load_run(run, overrides).anchored()
    _same_training(saved, experiment, run / EXPERIMENT)
    if folder.exists():
        raise RunError(f"{folder} exists already and is left as it is. Choose another --out.")
    machine, engine = load_here(experiment)
    adapter = adapter_of(run, machine)
    summary = read_summary(run)
    if merged:
        words = card.model_card(summary, merged=True) if summary else card.unmeasured(experiment.name)

        def beside(draft: Path) -> None:
            _export_files(machine, machine.base_sha256).save(draft)
            (draft / files.CARD).write_text(words.strip() + "\n", "utf-8")

        export_merged(engine.model, machine.tokenizer, adapter, machine.layout, folder, beside=beside)
    else:
        words = card.model_card(summary) if summary else card.unmeasured(experiment.name)
        with _whole(folder) as draft:
            _save(
                draft,
                experiment,
                machine,
                adapter,
                machine.base_sha256,
                bool(machine.describe()["conv1d"]),
                words,
            )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A place to write a folder, so that it appears whole or not at all."""
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _checked(
    experiment: Experiment, folder: Path, datasets: Sequence[Dataset], *, compared: bool
) -> Skeleton:
    """Check all that can be checked before training, then save the settings: a saved run can be finished."""
    base = load_skeleton(experiment)
    preflight.check(experiment, datasets, base)
    for dataset in datasets:
        questions.check(experiment, dataset)
    size = AdapterLayout.of(base.model, experiment.adapter).size
    preflight.check_disk(folder, preflight.disk(experiment, datasets[0], size, compared=compared))
    durable.write(folder / EXPERIMENT, experiment.to_toml().encode())
    return base


def _finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary, if there is one for exactly these settings; its page is made if a crash prevented that.

    Where only measuring settings differ, the training is kept and measured again.
    """
    summary = read_summary(folder)
    if summary is None or recorded(summary["experiment"], SUMMARY).anchored().plain() != experiment.plain():
        return None
    if not (folder / files.REPORT).exists():
        page.write(folder)
    return summary


def _when(folder: Path) -> tuple[float, float]:
    """When the first round began, and now. A training writes its inputs once; resuming only reads them."""
    return min((inputs.stat().st_mtime for inputs in folder.rglob(INPUTS)), default=time.time()), time.time()


def _base_name(experiment: Experiment) -> str:
    """Where PEFT finds the base: the embedded one is in this installation's own folder."""
    return str(base_folder("embedded")) if experiment.model.base == "embedded" else experiment.model.base


@contextmanager
def _claimed(folder: Path, experiment: Experiment, *, resume: bool) -> Iterator[None]:
    """Lock the folder for this experiment against other processes.

    If nothing has been committed by the end, everything made here is removed again, and settings are as they were.
    """
    saved = folder / EXPERIMENT
    if resume and not saved.exists():
        raise RunError(f"Nothing to resume: there is no {saved}.")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with checkpoint.lock(folder):
        before, rounds = saved.read_bytes() if resume else b"", _journalled(folder)
        try:
            if resume:
                _same_training(load_run(folder), experiment, saved)
            else:
                folders.expect_room(folder)  # a run that ended before its first round may start over
                durable.write(saved, experiment.to_toml().encode())
            yield
        except BaseException:
            if resume and _journalled(folder) == rounds and saved.read_bytes() != before:
                durable.write(saved, before)  # perhaps of an older version, which is to go on with it
            if missing and not folders.begun(folder) and not _quarantined(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _remove_empty(missing[1:])
            raise


def _journalled(folder: Path) -> int:
    """Lines of rounds, over all trainings in this folder."""
    return sum(len(journal.read(path)) for path in folder.rglob(METRICS))


def _quarantined(folder: Path) -> bool:
    return any(file.stat().st_size for file in folder.rglob(QUARANTINE))


def _remove_empty(places: Sequence[Path]) -> None:
    with suppress(OSError):  # somebody else put something there
        for place in places:
            place.rmdir()


def _same_training(saved: Experiment, wanted: Experiment, path: Path) -> None:
    """Refuse settings that would train another adapter."""
    if saved.fingerprint() != wanted.fingerprint():
        odd = changed(saved.trained(), wanted.trained())
        raise RunError(
            f"{path} is of another training: {', '.join(odd)} {'differ' if len(odd) > 1 else 'differs'}. "
            f"A training keeps its settings; only those that do not affect it may change: {', '.join(UNTRAINED)}."
        )


def _save(
    folder: Path,
    experiment: Experiment,
    base: Machine | Skeleton,
    adapter: AdapterState,
    base_sha256: str,
    conv1d: bool,
    words: str,
) -> None:
    """The adapter in PEFT's format, with all that other tools need to prompt and stop as in training."""
    folder.mkdir(parents=True, exist_ok=True)
    _export_files(base, base_sha256).save(folder)
    save_adapter(
        folder,
        adapter,
        experiment.adapter,
        base_name=_base_name(experiment),
        card=words,
        fan_in_fan_out=conv1d,
    )
    durable.sync_folder(folder)


def _export_files(base: Machine | Skeleton, base_sha256: str) -> ExportFiles:
    template = base.template
    return ExportFiles(
        base.tokenizer,
        chat_template(template, base.tokenizer),
        template.stop,
        template.format,
        template.system,
        base_sha256,
    )


def _finish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the model card, then the summary, which marks the run as finished, then the page made from it."""
    durable.write(folder / ADAPTER / files.CARD, (card.model_card(summary).strip() + "\n").encode())
    write_json(folder / SUMMARY, summary)
    page.write(folder)
