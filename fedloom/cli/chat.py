"""fedloom chat: talk to a tuned model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom.cli.arguments import RunFolder
from fedloom.cli.console import err, out


def command(
    run: RunFolder,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always says the likeliest.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Talk to the untuned base model instead.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Talk to a tuned model: type an instruction, read the answer as it comes; an empty line ends.

    Every instruction stands alone, as in training. A context goes after "||": What is it about? || The text.
    """
    from fedloom.config import load
    from fedloom.engine.generation import stream
    from fedloom.experiment import load_machine
    from fedloom.simulate import adapter_of

    machine = load_machine(load(run))
    adapter = None if base else adapter_of(run, machine)
    err.print(f"[dim]{'base model' if base else run}; an empty line ends.[/]")
    turn = 0
    while said := _ask():
        instruction, _, context = (part.strip() for part in said.partition("||"))
        ids = machine.template.prompt_ids(instruction, context, room=max_new_tokens)
        if (cut := machine.template.prompt_cut(instruction, context, room=max_new_tokens)) != "none":
            err.print(f"[dim]the end of the {cut} is left out: the base model reads {machine.positions:,} tokens.[/]")
        turn += 1
        shown = ""
        answer: list[int] = []
        for token in stream(
            machine.engine, ids, adapter, max_new_tokens=max_new_tokens, stop=machine.template.stop,
            temperature=temperature, seed=turn,
        ):  # fmt: skip
            answer.append(token)
            text = machine.template.decode(answer)
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter may span tokens
                out.print(text[len(shown) :], end="", markup=False, highlight=False, soft_wrap=True)
                shown = text
        out.print(machine.template.decode(answer)[len(shown) :], markup=False, highlight=False, soft_wrap=True)


def _ask() -> str:
    try:
        return err.input("[bold cyan]> [/]").strip()
    except EOFError:
        return ""
