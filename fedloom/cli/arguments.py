"""Arguments shared by several commands, and the checks made before anything slow begins."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.errors import RunError

if TYPE_CHECKING:
    from fedloom.experiment.settings import Experiment
    from fedloom.storage.folders import Kind


def complete_what(incomplete: str) -> Iterator[str]:
    """The completions a shell offers: recipes, TOML files, runs."""
    yield from complete_recipe(incomplete)
    yield from _paths(incomplete, files=True)


def complete_recipe(incomplete: str) -> Iterator[str]:
    from fedloom.experiment.toml import recipes

    yield from (name for name in recipes() if name.startswith(incomplete))


def complete_run(incomplete: str) -> Iterator[str]:
    from fedloom.storage.folders import RUNS

    if RUNS.name.startswith(incomplete):
        yield from _paths(f"{RUNS}{os.sep}", files=False)
    yield from _paths(incomplete, files=False)


def _paths(incomplete: str, *, files: bool) -> Iterator[str]:
    place, _, start = incomplete.rpartition(os.sep)
    folder = Path(place or (os.sep if incomplete.startswith(os.sep) else "."))
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (
            path.name.startswith(start)
            and (path.is_dir() or (files and path.suffix == ".toml"))
            and (start or path.name[0] != ".")
        ):
            yield str(path)


What = Annotated[
    str,
    typer.Argument(
        help="A recipe's name, a TOML file, or a run folder.",
        metavar="[RECIPE|FILE]",
        show_default=True,
        autocompletion=complete_what,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, like rounds=5 data.path=FILE.", metavar="[KEY=VALUE]..."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: a new one under runs/.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out from its last committed round.")
]
RunFolder = Annotated[
    Path, typer.Argument(help="The folder of a finished run.", metavar="RUN", autocompletion=complete_run)
]


def load_what(what: str, overrides: list[str] | None) -> Experiment:
    """The experiment of a recipe, a file or a run, with its settings changed."""
    from fedloom.experiment import toml
    from fedloom.storage import folders

    what, overrides = first_is_override(what, overrides)
    if what not in toml.recipes() and os.path.isdir(what):
        folders.expect_run(Path(what), recipes=toml.recipes())
    return toml.load(what, overrides)


def load_finished(run: Path, overrides: list[str] | None = None) -> Experiment:
    """The experiment of a finished run, with its settings changed."""
    from fedloom.experiment.finished import finished

    return finished(run, overrides or [])


def experiment_and_folder(
    what: str, overrides: list[str] | None, out: Path | None, resume: bool, *, kind: Kind
) -> tuple[Experiment, Path]:
    """The experiment to run, and its folder.

    A resumed run follows its own experiment.toml, except for settings that do not affect training.
    """
    from fedloom.experiment import toml
    from fedloom.storage import folders

    if not resume:
        experiment = load_what(what, overrides)
        place = out or fresh_folder(experiment.name)
        folders.expect_room(place)
        folders.expect_kind(place, kind)
        look_at_data(experiment)
        return experiment, place
    what, overrides = first_is_override(what, overrides)
    named = Path(what)
    folder = out or (named if os.path.isdir(named) else None)
    if folder is None:
        raise RunError("Expected the run to resume: --resume --out FOLDER.")
    try:
        folders.expect_run(folder, recipes=toml.recipes())
    except RunError as why:
        raise RunError(f"Nothing to resume. {why}") from why
    folders.expect_kind(folder, kind)
    return toml.load_run(folder, overrides), folder


def look_at_data(experiment: Experiment) -> None:
    """Read the data once to find mistakes in them, so that nobody waits for torch to hear of one.

    Clustering takes long and is left to the run, as is reading through the library `datasets`.
    """
    from fedloom.experiment.datasets import load_data

    data = experiment.data
    if data.source != "hub" and data.clusters is None:
        load_data(experiment)


def first_is_override(what: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """`fedloom run rounds=2` means the default recipe with an override."""
    if "=" in what and not os.path.exists(what):
        return "quickstart", [what, *(overrides or [])]
    return what, overrides or []


def fresh_folder(name: str) -> Path:
    from fedloom.storage.folders import RUNS

    number = 1
    while (folder := RUNS / f"{name}-{number}").exists():
        number += 1
    return folder


def stop_on_terminate() -> None:
    """SIGTERM stops a run like Ctrl-C: between two writes, with a message, and resumably."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
