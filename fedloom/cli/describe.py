"""fedloom describe: what would run, what would travel and what it needs, before anything runs."""

from __future__ import annotations

from fedloom.cli.arguments import Overrides, What, first_is_override
from fedloom.cli.console import note, out, size


def command(what: What = "quickstart", overrides: Overrides = None) -> None:
    """Show the resolved experiment, its parameters, bytes per round and memory. Trains nothing."""
    from rich.syntax import Syntax
    from rich.table import Table

    from fedloom.config import load
    from fedloom.plan import plan

    what, changes = first_is_override(what, overrides)
    experiment = load(what, changes)
    p = plan(experiment)
    note(p.notes)
    out.print(Syntax(experiment.to_toml(), "toml", background_color="default", word_wrap=True))
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("base model", f"{p.base_parameters:,}", "parameters, frozen")
    table.add_row("adapter", f"{p.adapter_parameters:,}", f"trained parameters in {p.targets} layers")
    table.add_row("up, each client", size(p.bytes_up), "what a client sends in a round: its delta and a few numbers")
    table.add_row("down, each client", size(p.bytes_down), "what a client receives in a round")
    table.add_row("traffic of a run", size(p.rounds * p.cohort * (p.bytes_up + p.bytes_down)), f"{p.rounds} rounds of {p.cohort:g} clients")
    table.add_row("memory", f"about {size(p.memory)}", f"{p.width} clients in one batch, {p.tokens_per_pass:,} tokens in a pass")
    for line in p.data:
        table.add_row("data", "", line)
    out.print(table)
