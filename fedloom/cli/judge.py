"""fedloom judge: a run's answers against others, pair by pair, or a comparison's in the papers' tables."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import note, out, say
from fedloom.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from fedloom.experiment.settings import Experiment
    from fedloom.report.judged import Table as Judged

DROPPED_FIRST = ("model", "orders disagree", "paper's own", "tie")  # columns of text in a narrow terminal
FEW = 5  # table columns that fit any terminal, with cells of several lines


class Kind(StrEnum):
    rule = "rule"
    likelihood = "likelihood"
    local = "local"
    endpoint = "endpoint"


class Form(StrEnum):
    relative = "relative"
    wins = "wins"


class RubricName(StrEnum):
    aspects = "aspects"
    total = "total"


def command(
    run: RunFolder,
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="The opponent. Of a run: base (default), reference (the held-out responses), or a JSONL file of answers. Of a comparison's table of wins: a column of evaluation.references, reference, or a row. May be repeated."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="The field of that file that holds the answer.")] = "answer",
    judge: Annotated[
        Kind | None,
        typer.Option(
            help="Who judges. Default: as the experiment says; else the rule if every question has one; else likelihood."
        ),
    ] = None,
    table: Annotated[
        Form | None,
        typer.Option(
            help="For a comparison: FedIT's table of relative scores, or FedPIT's of wins, ties and losses."
        ),
    ] = None,
    rubric: Annotated[
        RubricName | None,
        typer.Option(
            help="For a judge asked in words: FedPIT's four aspects 1-5 (default), or FedIT's total 1-10."
        ),
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="A text file with your own prompt for the judge. Default: ours.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many questions. Default: all.")] = None,
    one_order: Annotated[
        bool,
        typer.Option(
            "--one-order",
            help="Show each pair once, as FedIT's paper probably did; position bias then counts as quality.",
        ),
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Ratings of each pair in each order. Default: 1.")
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="How many times to ask again after a malformed reply. Default: 2."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The judge's model: a folder, a Hugging Face id, or the endpoint's name for it. Default for likelihood: the run's base."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible endpoint. Nothing is sent unless this is given."),
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoint's key.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sampling temperature of the judge's replies. Default: 0.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply of the judge, in tokens. Default: 400.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=32, help="Tokens that a judge on this machine reads and writes. Default: 2048."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for a reply. Default: 60.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time. Default: 4.")] = None,
    per_minute: Annotated[
        float | None, typer.Option(help="Most requests a minute. Default: no limit.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(min=0.0, help="Price of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0.0, help="Price of a million reply tokens.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Go ahead although it costs money, or an unknown amount.")
    ] = False,
) -> None:
    """Judge answers in pairs: a run's against its base's or stored ones, or a comparison's, as the papers do.

    Answers and verdicts are kept: an interrupted evaluation continues, a repeated one asks nothing. A
    comparison can be judged again by another judge without training.
    """
    given = {
        "model": model,
        "url": url,
        "key_variable": key_variable,
        "rubric": rubric and rubric.value,
        "prompt": prompt and str(prompt),
        "repeats": repeats,
        "retries": retries,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "max_length": max_length,
        "timeout": timeout,
        "concurrency": concurrency,
        "per_minute": per_minute,
        "price_in": price_in,
        "price_out": price_out,
    }
    options = {name: value for name, value in given.items() if value is not None}
    settings = {
        "table": table and table.value,
        "questions": questions,
        "both_orders": False if one_order else None,
    }
    experiment = _with_judge(
        load_finished(run, overrides),
        judge,
        options,
        {name: value for name, value in settings.items() if value is not None},
    )
    judge_and_print(run, experiment, against or [], field=field, yes=yes)


def _with_judge(
    experiment: Experiment, kind: Kind | None, options: dict[str, Any], settings: dict[str, Any]
) -> Experiment:
    """The experiment, with its `[judge]` changed by the command line's options."""
    old = experiment.plain().get("judge", {})
    before = old.get("by", {})
    name = kind.value if kind else "endpoint" if "url" in options else before.get("kind")
    by = {**(before if before.get("kind") == name else {}), **options}
    if (name == "endpoint") != ("url" in by):
        raise ConfigError("--judge endpoint and --url belong together: expected both, or neither.")
    if name in ("endpoint", "local") and "model" not in by:
        raise ConfigError(f"--judge {name} needs --model. Expected the name of the judge's model.")
    if name is None and options:
        raise ConfigError(
            f"--{next(iter(options)).replace('_', '-')} applies to one kind of judge only. Name it: --judge."
        )
    return experiment.with_(judge={**old, **settings, **({"by": {**by, "kind": name}} if name else {})})


def judge_and_print(
    run: Path, experiment: Experiment, against: Sequence[str] = (), *, field: str = "answer", yes: bool
) -> None:
    from fedloom.experiment.judging import judge
    from fedloom.report import judged
    from fedloom.storage import files, folders

    found = judge(
        run,
        experiment,
        against=against,
        field=field,
        agreed=yes,
        say=lambda what: note(f"[dim]{escape(what)}[/]"),
    )
    if folders.kind(run) == "run":
        tables, pairs, wrote = [judged.pair(found)], found["judged"], f"{run / files.JUDGE}"
    else:
        tables, pairs = (
            judged.tables(found, experiment.algorithm.title),
            sum(r["judged"] for r in found["rows"]),
        )
        wrote = f"{run / files.JUDGED} and {run / files.REPORT}"
    for table in tables:
        out.print(rich_table(table))
        for line in table.notes:
            say(line)
    say(f"Wrote {wrote}")
    if not pairs:
        raise RunError(
            "No pair could be judged: no reply of the judge could be read. Correct that and repeat the command."
        )


def rich_table(found: Judged) -> Table:
    """As many columns as fit the terminal; the page has them all."""
    shown = list(range(len(found.head)))
    table = _rich_table(found, shown)
    while (
        len(shown) > FEW
        and out.measure(table, options=out.options.update(width=1000)).maximum > out.width
        and (wide := [i for name in DROPPED_FIRST for i in shown if found.head[i] == name])
    ):
        shown.remove(wide[0])
        table = _rich_table(found, shown)
    return table


def _rich_table(found: Judged, shown: Sequence[int]) -> Table:
    from rich.table import Table

    table = Table(title=found.title, title_justify="left")
    for i in shown:
        table.add_column(
            found.head[i], justify="left" if i == 0 or found.head[i] in ("task", "model") else "right"
        )
    for cells, bold in zip(found.body, found.bold, strict=True):
        table.add_row(*(cells[i] for i in shown), style="bold" if bold else "")
    return table
