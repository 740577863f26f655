"""Other people's programs as contestants: their own unmodified code, from a clone that the user names.

Whatever old programs need to run with current libraries is done from outside, while they run: a module is
substituted, an argument translated. None of their files is changed or copied.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fedloom.errors import ConfigError


@contextlib.contextmanager
def at_home(clone: Path, stand_ins: dict[str, ModuleType]) -> Iterator[None]:
    """Inside, imports and relative paths are those of the clone, and no network is used.

    Afterwards its modules are forgotten: two peers each have one called `utils`.
    """
    before = set(sys.modules)
    replaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(clone))
    talkative = [logging.getLogger(name) for name in ("transformers", "datasets", "accelerate", "peft")]
    levels = [logger.level for logger in talkative]
    for logger in talkative:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.chdir(clone),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(talkative, levels, strict=True):
            logger.setLevel(level)
        sys.path.remove(str(clone))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(clone):
                del sys.modules[name]
        for name, module in replaced.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def check(clone: Path, commit: str, url: str) -> Path:
    """The clone, if it is at the commit that the figures refer to and none of its programs has changed."""
    how = f"Do: git clone {url} && git checkout {commit}"
    if not (clone / ".git").exists():
        raise ConfigError(f"Expected a clone of {url} in {clone.name}. {how}")
    head = _git(clone, "rev-parse", "HEAD")
    if not head.startswith(commit):
        raise ConfigError(f"Expected {clone.name} at commit {commit}, found {head[:7]}. {how}")
    if changed := _git(clone, "diff", "--name-only", "--diff-filter=M", "HEAD", "--", "*.py"):
        raise ConfigError(f"Expected {clone.name} unmodified; changed: {changed.replace(chr(10), ', ')}.")
    return clone.resolve()


def _git(clone: Path, *words: str) -> str:
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.run(
        ["git", "-C", str(clone), *words], capture_output=True, text=True, check=True, env=environment
    )
    return said.stdout.strip()


def needed(module: str, why: str) -> Any:
    """Import a module that a peer needs and fedloom does not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{why} needs the package {module!r}: pip install {module}") from error


def blank(name: str, **contents: Any) -> ModuleType:
    """A substitute for a module that is not installed."""
    module = ModuleType(name)
    vars(module).update(contents)
    return module
