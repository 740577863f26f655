"""fedloom chat: talk to a tuned model in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedloom.cli.arguments import RunFolder, load_finished
from fedloom.cli.console import counted, err, note, out
from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.experiment.settings import Experiment

HELP = """Every instruction stands alone, as in training. A context goes after "||": What is it about? || The text.
/base  switch between the tuned and the untuned model
/help  this
/quit  end, as an empty line does
Ctrl-C stops an answer; at the prompt it ends."""


def command(
    run: RunFolder,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always says the likeliest.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Talk to the untuned base model instead.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Talk to a tuned model: type an instruction, read the answer as it comes; an empty line ends.

    Every instruction stands alone, as in training. A context goes after "||": What is it about? || The text.
    While it runs, /base switches between tuned and untuned, Ctrl-C stops an answer, /help tells more.
    """
    experiment = load_finished(run)
    note("[dim]loading the base model[/]")
    from fedloom.engine.generation import stream
    from fedloom.experiment.commands import adapter_of
    from fedloom.experiment.machine import load_here

    machine, engine = load_here(experiment)
    tuned = adapter_of(run, machine)
    note(f"[dim]{escape(_whose(experiment, run, base=base))}; /help tells more.[/]")
    for turn, said in enumerate(_instructions(), 1):
        if said.startswith("/") and said[1:].isalpha():
            if said in ("/quit", "/exit"):
                return
            base ^= said == "/base"
            shown = _whose(experiment, run, base=base) if said == "/base" else HELP
            note(
                f"[dim]{escape(shown if said in ('/base', '/help') else f'There is no {said}.{chr(10)}{HELP}')}[/]"
            )
            continue
        instruction, _, context = (part.strip() for part in said.partition("||"))
        ids = machine.template.prompt_ids(instruction, context, room=max_new_tokens)
        if (cut := machine.template.prompt_cut(instruction, context, room=max_new_tokens)) != "none":
            note(
                f"[dim]the end of the {cut} is left out: the base model reads {machine.positions:,} tokens.[/]"
            )
        shown, answer = "", list[int]()
        try:
            for token in stream(
                engine.served,
                ids,
                None if base else tuned,
                max_new_tokens=max_new_tokens,
                stop=machine.template.stop,
                temperature=temperature,
                seed=turn,
            ):
                answer.append(token)
                text = machine.template.decode(answer)
                if text.startswith(shown) and not text.endswith(
                    "\N{REPLACEMENT CHARACTER}"
                ):  # a letter may span tokens
                    out.print(text[len(shown) :], end="", soft_wrap=True)
                    shown = text
            out.print(machine.template.decode(answer)[len(shown) :], end="", soft_wrap=True)
            if len(answer) == max_new_tokens:
                err.print(f" [dim]… cut at {counted(max_new_tokens, 'token')}[/]", end="")
        except KeyboardInterrupt:
            err.print(" [dim]… stopped[/]", end="")
        out.print()


def _whose(experiment: Experiment, run: Path, *, base: bool) -> str:
    """Whose model answers."""
    if base:
        return f"The base model {experiment.model.base}, untuned"
    clients = f" of {counted(experiment.data.clients, 'client')}" if experiment.data.clients else ""
    several = experiment.compare.seeds if any(run.glob("seed-*/")) else 1
    seed = f"seed {experiment.seed}" + (f", the first of {several}" if several > 1 else "")
    return f"{run}: the adapter{clients} tuned by {experiment.algorithm.title} on {experiment.model.base}, {seed}"


def _instructions() -> Iterator[str]:
    """What is typed, line by line, until an empty one."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # a whole buffer fails otherwise, with the good lines in it
    number = 0
    while line := _line():
        number += 1
        try:
            line.encode()
        except UnicodeEncodeError as foreign:
            raise DataError(
                f"Line {number} of what was typed or piped in is not UTF-8 at its character {foreign.start + 1}. "
                "Convert it first, say: iconv -f latin1 -t utf-8."
            ) from None
        yield line


def _line() -> str:
    try:
        return err.input("[bold cyan]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        err.print()
        return ""
