"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.errors import RunError

if TYPE_CHECKING:
    from fedloom.config import Experiment

What = Annotated[
    str, typer.Argument(help="A recipe's name, a TOML file, or a run folder.", metavar="[RECIPE|FILE]", show_default=True)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, like rounds=5 data.path=FILE.", metavar="[KEY=VALUE]...")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: a new one under runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its last committed round.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")]


def experiment_and_folder(what: str, overrides: list[str] | None, out: Path | None, resume: bool) -> tuple[Experiment, Path]:
    """What to run and where. A resumed run is what its own experiment.toml says, but for settings that decide no training."""
    from fedloom.config import load

    what, overrides = first_is_override(what, overrides)
    if not resume:
        experiment = load(what, overrides)
        return experiment, out or fresh_folder(experiment.name)
    folder = out or (Path(what) if Path(what).is_dir() else None)
    if folder is None:
        raise RunError("Expected the run to resume: --resume --out FOLDER.")
    if not (folder / "experiment.toml").exists():
        raise RunError(f"Nothing to resume: there is no {folder / 'experiment.toml'}.")
    return load(folder / "experiment.toml", overrides), folder


def first_is_override(what: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """`fedloom run rounds=2` means the default recipe with an override."""
    if "=" in what and not Path(what).exists():
        return "quickstart", [what, *(overrides or [])]
    return what, overrides or []


def fresh_folder(name: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def stop_on_terminate() -> None:
    """SIGTERM stops like Ctrl-C: between two writes, with a message and a run that can be resumed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
