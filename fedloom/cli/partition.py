"""fedloom partition: preview who would hold what, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedloom.cli.arguments import Overrides, What, load_what
from fedloom.cli.console import notes, out, say
from fedloom.errors import ConfigError

COLOURS = (
    "blue",
    "green",
    "yellow",
    "magenta",
    "cyan",
    "red",
    "bright_blue",
    "bright_green",
    "bright_yellow",
    "bright_magenta",
)
BAR = 40  # characters for the largest client


def command(
    what: What = "quickstart",
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Also write the picture as a page, FILE.html.")
    ] = None,
) -> None:
    """Preview the split: a table and a picture of how many examples of each kind each client holds."""
    if to is not None and not to.absolute().parent.is_dir():
        raise ConfigError(
            f"There is no folder {to.parent} to write {to.name} in. Make it, or choose another --out."
        )
    from fedloom.experiment.datasets import load_data

    dataset = load_data(load_what(what, overrides))
    notes(dataset.notes)
    shown = asdict(dataset.table)
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(shown["totals"])}
    legend = Text("  ").join(
        Text(f"█ {group} {count:,}", style=colours[group]) for group, count in shown["totals"].items()
    )
    out.print(legend)
    table = Table()
    table.add_column("client")
    table.add_column("examples", justify="right")
    table.add_column("skew", justify="right")
    table.add_column("holds")
    largest = max(c["size"] for c in shown["clients"])
    for client in shown["clients"]:
        table.add_row(
            client["client"],
            f"{client['size']:,}",
            f"{client['distance']:.2f}",
            _bar(client["counts"], largest, colours),
        )
    out.print(table)
    say(
        f"{sum(shown['totals'].values()):,} training examples, {len(dataset.test):,} held out. Skew is the distance of a "
        f"client's mix from everybody's, 0 the same and 1 disjoint; {dataset.table.distance:.2f} on average."
    )
    if to is not None:
        from fedloom.report.page import write_partition

        say(
            f"Picture: {write_partition({'by': dataset.by, 'distance': dataset.table.distance, **shown}, to)}"
        )


def _bar(counts: Mapping[str, Any], largest: int, colours: Mapping[str, str]) -> Text:
    bar = Text()
    so_far, drawn = 0, 0
    for group, count in counts.items():
        so_far += count
        end = round(so_far / largest * BAR)  # cumulative, so that rounding errors do not add up
        bar.append("█" * (end - drawn), style=colours[group])
        drawn = end
    return bar
