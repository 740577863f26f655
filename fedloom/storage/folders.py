"""Tell a run, a comparison, a part of one and anything else apart by their files alone.

Whoever names the wrong folder is told what it is and which one was probably meant. Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from fedloom.errors import RunError
from fedloom.storage import journal
from fedloom.storage.files import ADAPTER, EXPERIMENT, METRICS, RESULT, STATE, SUMMARY

RUNS = Path("runs")  # where runs go that are given no folder
LISTED = 4  # runs that a message names at most

Kind = Literal["run", "compare"]  # the command that makes it


def kind(folder: Path) -> Kind:
    return "compare" if any(folder.glob("seed-*/")) else "run"


def resume(folder: Path) -> str:
    """The command that goes on with it."""
    return f"fedloom {kind(folder)} --resume --out {shlex.quote(str(folder))}"


def begun(folder: Path) -> bool:
    """Was a round committed here?"""
    return any(folder.rglob(METRICS))


def expect_run(path: Path, *, recipes: Collection[str] = ()) -> None:
    """Raises RunError for anything that is no run, and says what it is instead: one of the `recipes`, perhaps."""
    if not _is_run(path):
        raise RunError(f"{_not_a_run(path, recipes)} {_instead(path, recipes)}".rstrip())


def expect_finished(path: Path, *, rounds: int, seeds: int) -> None:
    """Raises RunError for a run of `rounds` rounds, or a comparison of `seeds` seeds, whose training has not ended."""
    if (path / ADAPTER).is_dir() or (path / SUMMARY).exists():
        return
    if kind(path) == "compare":
        finished = len(list(path.glob(f"seed-*/{RESULT}")))
        raise RunError(
            f"{path} is not finished: {finished} of {seeds} seeds are done. Go on with it: {resume(path)}"
        )
    done = max((record["round"] for record in journal.read(path / METRICS)), default=0)
    if done < rounds:
        raise RunError(
            f"{path} is not finished: {done} of {rounds} rounds are done. Go on with it: {resume(path)}"
        )


def expect_room(path: Path) -> None:
    """Raises RunError where a new run would come upon one that has begun."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file. Expected a folder for the run: choose another --out.")
    if (path / EXPERIMENT).exists() and begun(path):
        raise RunError(f"{path} already holds a run. Go on with it by --resume, or choose another --out.")


def expect_kind(path: Path, wanted: Kind) -> None:
    """Raises RunError where the run that is gone on with, or begun here, is of the other kind."""
    found = kind(path)
    if found != wanted and (found == "compare" or (path / STATE).exists()):
        what = {"run": "a run", "compare": "a comparison"}[found]
        raise RunError(f"{path} holds {what}. Go on with it: {resume(path)}")


def known(around: Path = Path(".")) -> list[Path]:
    """The runs under runs/ and beside one, newest first."""
    places = dict.fromkeys(
        folder for place in (RUNS, around) if place.is_dir() for folder in place.glob("*/") if _is_run(folder)
    )
    return sorted(places, key=lambda folder: (folder / EXPERIMENT).stat().st_mtime, reverse=True)


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / EXPERIMENT)  # which is False, not an error, for a name that no disk takes


def _not_a_run(path: Path, recipes: Collection[str]) -> str:
    """Says what `path` is instead."""
    name = str(path)
    if not os.path.exists(path):
        if name in recipes:
            return f"{name!r} is a recipe, not the folder of a run. Run it first: fedloom run {name}."
        return f"There is no folder {name!r}."
    for above in path.absolute().parents:
        if _is_run(above):
            return f"{name!r} is {_part(path, above)}"
    if path.is_dir():
        within = [folder for folder in sorted(path.glob("*/")) if _is_run(folder)]
        return (
            f"{name!r} is a folder that holds runs."
            if within
            else f"{name!r} is a folder, but no run: it has no {EXPERIMENT}."
        )
    if path.suffix == ".toml":
        return f"{name!r} is an experiment to run, not the folder of a run. Run it first: fedloom run {shlex.quote(name)}."
    return f"{name!r} is a file. Expected the folder of a run."


def _part(path: Path, run: Path) -> str:
    shown = _shortest(run)
    whole = "comparison" if kind(run) == "compare" else "run"
    if path.is_dir() and path.name.startswith("seed-"):
        return f"a seed of the {whole} {shown}, not a run of its own. Expected {shown}."
    return f"a part of the {whole} {shown}. Expected {shown}."


def _shortest(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def _instead(path: Path, recipes: Collection[str]) -> str:
    """Says which run was probably meant, as far as names tell."""
    exists = os.path.exists(path)
    if exists and any(_is_run(above) for above in path.absolute().parents):
        return ""
    around = path if os.path.isdir(path) else path.parent
    runs = known(around if os.path.isdir(around) else Path("."))
    if not runs:
        return (
            ""
            if exists or str(path) in recipes
            else "There are no runs here yet; make one: fedloom run quickstart."
        )
    if close := [run for run in runs if _alike(path.name, run.name)]:
        return f"Did you mean {_listed(close)}?"
    return f"Runs here: {_listed(runs)}."


def _alike(given: str, name: str) -> bool:
    return name.startswith(f"{given}-") or bool(difflib.get_close_matches(given, [name], cutoff=0.7))


def _listed(runs: Sequence[Path]) -> str:
    more = [f"{len(runs) - LISTED} more"] if len(runs) > LISTED else []
    return ", ".join([*map(str, runs[:LISTED]), *more])
