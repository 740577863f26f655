"""fedloom chat: talk to a tuned model in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.markup import escape

from fedloom.cli.arguments import RunFolder, load_finished
from fedloom.cli.console import counted, err, note, out
from fedloom.errors import DataError

HELP = """Every instruction stands alone, as in training. A context goes after "||": What is it about? || The text.
/base  switch between the tuned and the untuned model
/help  show this text
/quit  leave; so does an empty line
Ctrl-C stops an answer; at the prompt it leaves."""


def command(
    run: RunFolder,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Talk to the untuned base model instead.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Talk to a tuned model: type an instruction, read the answer as it comes; an empty line ends.

    Every instruction stands alone, as in training. A context goes after "||": What is it about? || The text.
    In the chat, /base switches between tuned and untuned, Ctrl-C stops an answer, /help says more.
    """
    load_finished(run)
    note("[dim]loading the base model[/]")
    from fedloom.experiment.chat import chat

    model = chat(run)
    note(f"[dim]{escape(model.whose(base=base))}; /help says more.[/]")
    for turn, said in enumerate(_instructions(), 1):
        if said.startswith("/") and said[1:].isalpha():
            if said in ("/quit", "/exit"):
                return
            base ^= said == "/base"
            known = {"/base": model.whose(base=base), "/help": HELP}
            note(f"[dim]{escape(known.get(said) or f'There is no {said}.{chr(10)}{HELP}')}[/]")
            continue
        instruction, _, context = (part.strip() for part in said.partition("||"))
        if (cut := model.cut(instruction, context, max_new_tokens=max_new_tokens)) != "none":
            note(
                f"[dim]the end of the {cut} is left out: the base model reads {model.machine.positions:,} tokens.[/]"
            )
        tokens = 0
        try:
            for piece in model.answer(
                instruction,
                context,
                base=base,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=turn,
            ):
                out.print(piece.text, end="", soft_wrap=True)
                tokens = piece.tokens
            if tokens == max_new_tokens:
                err.print(f" [dim]… cut at {counted(max_new_tokens, 'token')}[/]", end="")
        except KeyboardInterrupt:
            err.print(" [dim]… stopped[/]", end="")
        out.print()


def _instructions() -> Iterator[str]:
    """The user's input, line by line, until an empty line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # decoding a whole buffer would lose its good lines too
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
