"""fedloom copy: a shipped recipe as a file of your own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.arguments import complete_recipe
from fedloom.cli.console import say
from fedloom.errors import ConfigError


def command(
    recipe: Annotated[str, typer.Argument(help="The recipe's name.", autocompletion=complete_recipe)],
    to: Annotated[Path | None, typer.Argument(help="Where to put it. Default: RECIPE.toml here.")] = None,
) -> None:
    """Copy a recipe into a file to edit; then: fedloom run FILE."""
    from fedloom.experiment.choices import did_you_mean
    from fedloom.experiment.toml import recipes

    shipped = recipes()
    if recipe not in shipped:
        raise ConfigError(
            f"Expected one of the recipes {', '.join(shipped)}; got {recipe!r}{did_you_mean(recipe, shipped)}"
        )
    path = to or Path(f"{recipe}.toml")
    if path.is_dir():
        path = path / f"{recipe}.toml"
    try:
        with open(path, "x", encoding="utf-8") as file:
            try:
                file.write(shipped[recipe])
                file.flush()
            except OSError:
                path.unlink()  # a half-written recipe would be read as a whole one
                raise
    except FileExistsError as exists:
        raise ConfigError(f"{path} exists already and is left as it is. Choose another name.") from exists
    except OSError as failed:
        raise ConfigError(f"Could not write {path}: {failed.strerror}.") from failed
    say(f"Wrote {path}. Try: fedloom describe {shlex.quote(str(path))}")
