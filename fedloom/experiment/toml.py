"""Experiments as TOML: recipes, files, the folders of runs, and `section.key=value` on the command line."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError
from fedloom.experiment.choices import choice_of, did_you_mean, keys
from fedloom.experiment.settings import Experiment, checked
from fedloom.storage.files import EXPERIMENT

# Names that differ in version 0.1.0: a key, or a name used as a key's value.
RENAMED = {
    "model.device": "machine.device",
    "model.path": "machine.kernels",
    "model.tokens_per_pass": "machine.tokens_per_pass",
    "model.checkpointing": "machine.checkpointing",
    "model.vllm": "machine.vllm",
    "transport.width": "machine.clients_per_batch",
    "audit.every": "leakage.every",
    "cohort.kind=fixed": "cohort.kind=uniform",
    "synthesis.kind=spare": "synthesis.kind=held_back",
    "synthesis.kind=restyled": "synthesis.kind=other_style",
}
DATA = {".json", ".jsonl", ".csv", ".tsv", ".parquet"}  # files people pass where a recipe is expected


def recipes() -> dict[str, str]:
    """Shipped recipes: name -> TOML text."""
    folder = resources.files("fedloom") / "recipes"
    return {
        f.name.removesuffix(".toml"): f.read_text("utf-8")
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".toml")
    }


def load(what: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a recipe, a TOML file or a run's folder, with overrides applied. Raises: ConfigError.

    An override is `section.key=value`. The folder may be from version 0.1.0; files and overrides must use the
    current names.
    """
    shipped = recipes()
    if Path(what).is_dir() and str(what) not in shipped:
        return load_run(Path(what), overrides)
    if str(what) in shipped:
        return parse(shipped[str(what)], f"recipe {what}", overrides)
    return parse(_text(Path(what)), str(what), overrides)


def load_run(folder: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run's folder, whatever the folder is called. Raises: ConfigError."""
    file = folder / EXPERIMENT
    return _overridden(_today(_tree(_text(file), str(file))), str(file), overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """The settings in a TOML text; errors refer to it as `name`. Raises: ConfigError."""
    return _overridden(_tree(text, name), name, overrides)


def recorded(plain: Mapping[str, Any], name: str) -> Experiment:
    """The settings in a run's summary, written by this version or by 0.1.0. Raises: ConfigError."""
    return checked(_today(plain), name)


def _overridden(tree: dict[str, Any], name: str, overrides: Sequence[str]) -> Experiment:
    for item in overrides:
        _override(tree, item)
    if old := [f"{was} is now {now}" for was, now in RENAMED.items() if _stands(tree, was)]:
        raise ConfigError(
            f"{name}: {'; '.join(old)}. Expected the new {'names' if len(old) > 1 else 'name'}."
        )
    return checked(tree, name)


def _tree(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as bad:
        raise ConfigError(f"{name} is not valid TOML: {bad}") from bad


def _text(path: Path) -> str:
    if DATA & set(path.suffixes) and os.path.isfile(path):
        raise ConfigError(
            f"{path} is data. Expected a recipe ({', '.join(recipes())}) or a TOML file, and there data.path={path}."
        )
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError) as missing:
        shipped = recipes()
        raise ConfigError(
            f"Expected a recipe ({', '.join(shipped)}) or a TOML file; there is no {str(path)!r}{did_you_mean(str(path), shipped)}"
        ) from missing
    except UnicodeDecodeError as foreign:
        line = foreign.object.count(b"\n", 0, foreign.start) + 1
        raise ConfigError(
            f"{path}:{line} is not UTF-8. Expected a TOML file, which always is: save it as UTF-8."
        ) from foreign
    except OSError as failed:
        raise ConfigError(f"Could not read {path}: {failed.strerror or failed}.") from failed


# --- overrides -------------------------------------------------------------------------------------------


def _override(tree: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    where = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|([^."]+)', path)]
    if not equals or not where:
        raise ConfigError(f"Expected an override like rounds=5 or data.path=FILE, got {item!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so the command line needs no quotes
    *parents, leaf = where
    table: dict[str, Any] = tree
    hint: Any = Experiment
    for parent in parents:
        below, hint = table.setdefault(parent, {}), keys(hint, table).get(parent)
        choice = choice_of(hint)
        if isinstance(below, str) and choice is not None:  # `cohort = "all"` is short for `{ kind = "all" }`
            below = table[parent] = {choice.tag: below}
        if not isinstance(below, dict):
            raise ConfigError(f"Cannot set {path}: {parent} is a value, not a section.")
        table = below
    choice = choice_of(hint)
    if (
        choice is not None
        and leaf == choice.tag
        and choice.canonical(table.get(leaf)) != choice.canonical(value)
    ):
        table.clear()  # another class: the old one's options do not apply to it
    table[leaf] = value


# --- older versions --------------------------------------------------------------------------------------


def _stands(tree: Mapping[str, Any], key: str) -> bool:
    """Whether this tree contains a key of `RENAMED`."""
    path, named, name = key.partition("=")
    *parents, leaf = path.split(".")
    found: Any = tree
    for parent in parents:
        found = found.get(parent) if isinstance(found, Mapping) else None
    if not named:
        return isinstance(found, Mapping) and leaf in found
    return name == (found.get(leaf) if isinstance(found, Mapping) else found)


def _today(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under their current names."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
    for was, now in RENAMED.items():
        if _stands(tree, was):
            section, key = was.partition("=")[0].split(".")
            held = tree[section]
            value = (
                held.pop(key) if isinstance(held, dict) else tree.pop(section)
            )  # `cohort = "fixed"`: all of it
            section, _, key = now.partition("=")[0].partition(".")
            tree.setdefault(section, {})[key] = now.partition("=")[2] or value
    return tree
