"""fedloom recipes: the experiments that ship."""

from __future__ import annotations

import re

from fedloom.cli.console import say


def command() -> None:
    """List the recipes: what each shows, how long it takes and what it needs."""
    from fedloom.experiment.toml import recipes

    for name, text in recipes().items():
        shows, takes, needs = about(text)
        say(f"{name}: {shows}")
        say(f"    takes {takes}; needs {needs}")
    say(
        "See one: fedloom describe quickstart. Run it: fedloom compare quickstart. Change a copy: fedloom copy quickstart"
    )


def about(recipe: str) -> tuple[str, str, str]:
    """A recipe's purpose, time and needs, from its comments: first line, `# Takes: ...`, `# Needs: ...`."""
    facts = dict(re.findall(r"^# (Takes|Needs): (.+)$", recipe, re.MULTILINE))
    return recipe.splitlines()[0].removeprefix("# "), facts.get("Takes", ""), facts.get("Needs", "")
