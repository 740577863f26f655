"""fedloom recipes: the experiments that ship."""

from __future__ import annotations

import re

from fedloom.cli.console import out, say


def command() -> None:
    """List the recipes: what each shows, how long it takes and what it needs."""
    from rich.table import Table

    from fedloom.config import recipes

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), expand=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("shows", ratio=3)
    table.add_column("takes", ratio=2, overflow="fold")
    table.add_column("needs", ratio=2, overflow="fold")
    for name, text in recipes().items():
        table.add_row(name, *about(text))
    out.print(table)
    say("See one: fedloom describe quickstart. Run it: fedloom compare quickstart. Change a copy: fedloom copy quickstart")


def about(recipe: str) -> tuple[str, str, str]:
    """What it shows, takes and needs, as its comments say: the first line, `# Takes: ...` and `# Needs: ...`."""
    facts = dict(re.findall(r"^# (Takes|Needs): (.+)$", recipe, re.MULTILINE))
    return recipe.splitlines()[0].removeprefix("# "), facts.get("Takes", ""), facts.get("Needs", "")
