"""fedloom judge: answers against somebody else's, pair by pair: a run's, or all of a comparison's in the papers' tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import note, out, say
from fedloom.errors import ConfigError, RunError
from fedloom.experiment.settings import JUDGED_BY, Judge

if TYPE_CHECKING:
    from rich.table import Table

    from fedloom.evaluation.pairwise import Comparison, Share
    from fedloom.experiment.settings import Experiment
    from fedloom.report.judged import Table as Judged


DROPPED_FIRST = ("model", "orders disagree", "paper's own", "tie")  # columns, where a terminal is narrow
FEW = 5  # columns that any terminal shows, with cells of several lines


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
            help="The opponent. Of a run: base (default), reference (the held-out responses), or a JSONL file of answers. Of a comparison's table of wins: a column of evaluation.references, reference, or a row; may be given again."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="The field of that file that holds the answer.")] = "answer",
    judge: Annotated[
        Kind | None,
        typer.Option(
            help="Who judges. Default: what the experiment says, else the rule where every question has one, else likelihood."
        ),
    ] = None,
    table: Annotated[
        Form | None,
        typer.Option(
            help="Of a comparison: FedIT's table of relative scores, or FedPIT's of wins, ties and losses."
        ),
    ] = None,
    rubric: Annotated[
        RubricName | None,
        typer.Option(
            help="For a judge asked in words: FedPIT's four aspects 1-5 (default), or FedIT's total 1-10."
        ),
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="Your own words for the judge, a text file. Default: ours.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many questions. Default: all.")] = None,
    one_order: Annotated[
        bool,
        typer.Option(
            "--one-order",
            help="Show each pair once, as FedIT's paper is thought to have done; a liking for the first place then counts as quality.",
        ),
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Ratings of each pair in each order. Default: 1.")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(min=0, help="How often a malformed reply is asked for again. Default: 2.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The judge's model: a folder or a Hugging Face id, or the endpoint's name for it. Default for likelihood: the run's base."
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
        float | None, typer.Option(min=0.0, help="Of the judge's replies. Default: 0.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply of the judge. Default: 400.")
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
        bool, typer.Option("--yes", help="Go ahead although it costs money, or nobody knows how much.")
    ] = False,
) -> None:
    """Judge answers in pairs: a run's against its base's or stored ones, or all of a comparison's in the papers' tables.

    Answers and verdicts are kept: an interrupted evaluation goes on, a repeated one asks nothing. A comparison
    can be judged again by another judge without training.
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
    settings: dict[str, Any] = {
        "table": table and table.value,
        "questions": questions,
        "both_orders": False if one_order else None,
    }
    experiment = load_finished(run, overrides)
    compared = any(run.glob("seed-*/"))
    if compared:
        settings["against"] = against
    experiment = _with_judge(
        experiment, judge, options, {name: value for name, value in settings.items() if value is not None}
    )
    if compared:
        judge_and_print(run, experiment, yes)
    else:
        _judge_run(run, experiment, experiment.judge or Judge(), (against or ["base"])[0], field, yes)


def _with_judge(
    experiment: Experiment, kind: Kind | None, options: dict[str, Any], settings: dict[str, Any]
) -> Experiment:
    """The experiment, with its `[judge]` changed by what the command line says."""
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
            f"--{next(iter(options)).replace('_', '-')} is about a judge of one kind. Name it: --judge."
        )
    return experiment.with_(judge={**old, **settings, **({"by": {**by, "kind": name}} if name else {})})


def judge_and_print(folder: Path, experiment: Experiment, yes: bool) -> None:
    from fedloom.experiment.judging import judge
    from fedloom.experiment.summary import JUDGED
    from fedloom.report import page

    if not (folder / "summary.json").exists():
        raise RunError(
            f"{folder} is a comparison that is not finished. Go on with it: fedloom compare --resume --out {folder}"
        )
    found = judge(folder, experiment, agreed=yes, say=lambda what: note(f"[dim]{escape(what)}[/]"))
    print_judged(found, experiment)
    say(f"Wrote {folder / JUDGED} and {page.write(folder)}")
    if not any(r["judged"] for r in found["rows"]):
        raise RunError(
            "No pair could be judged: the judge said nothing that could be read. Mend that and give the same command again."
        )


def print_judged(judged: Mapping[str, Any], experiment: Experiment) -> None:
    """The paper's table, as the page has it."""
    from fedloom.report.judged import tables

    for found in tables(judged, experiment.algorithm.title):
        out.print(rich_table(found))
        for line in found.notes:
            say(line)


def rich_table(found: Judged) -> Table:
    """As many columns as the terminal has room for; the page has them all."""
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


def _judge_run(
    run: Path, experiment: Experiment, settings: Judge, against: str, field: str, yes: bool
) -> None:
    from fedloom.evaluation.answers import answers_of
    from fedloom.evaluation.cache import Cache
    from fedloom.evaluation.judge import compare
    from fedloom.evaluation.questions import answers
    from fedloom.experiment.commands import adapter_of
    from fedloom.experiment.datasets import load_data
    from fedloom.experiment.judges import build, how, judged_by, tell_cost
    from fedloom.experiment.judging import questions_of
    from fedloom.experiment.machine import load_machine
    from fedloom.experiment.summary import ANSWERS, write_json

    test, _ = questions_of(experiment, load_data(experiment))
    machine = load_machine(experiment)
    by = judged_by(settings, test)
    the_judge = build(by, experiment, machine)
    rows = {"run": adapter_of(run, machine)} | ({"base": None} if against == "base" else {})
    answered = answers_of(
        machine.engine,
        machine.template,
        test,
        rows,
        weights=machine.base_hash,
        max_new_tokens=experiment.evaluation.max_new_tokens,
        cache=Cache(run / ANSWERS),
    )
    said = {row: [a.text for a in its] for row, its in answered.items()}
    if against == "base":
        theirs = said["base"]
    elif against == "reference":
        theirs = [e.response for e in test]
    else:
        theirs = answers(against, test, field)
    kept = Cache(run / "judge" / "verdicts.jsonl")
    tell_cost(
        settings,
        the_judge,
        [(test, said["run"], theirs)],
        kept,
        agreed=yes,
        say=lambda cost: note(escape(cost)),
    )
    found = compare(the_judge, test, said["run"], theirs, cache=kept, **how(settings))
    identity = {name: value for name, value in the_judge.identity.items() if name != "prompt"}
    write_json(run / "judge.json", {"against": against, "judge": identity, **found.plain()})
    out.print(_table(found, f"run against {against}, judged by {JUDGED_BY.name(by)}"))
    for line in _notes(found):
        say(line)
    say(f"Wrote {run / 'judge.json'}")
    if found.judged == 0:
        raise RunError(
            "No pair could be judged; the reasons are listed above. Mend that and give the same command again."
        )


def _table(found: Comparison, title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("run", justify="right")
    table.add_column("95% interval", justify="right")
    shares = {"win": found.win, "tie": found.tie, "lose": found.lose, "win or tie": found.win_or_tie}
    if found.order_disagreement is not None:
        shares["orders disagree"] = found.order_disagreement
    for name, part in shares.items():
        table.add_row(name, *_percent(part))
    if found.difference is not None:
        ci = found.difference.ci95
        spread = (
            "the same everywhere"
            if found.difference.constant
            else f"{ci[0]:+.3f} to {ci[1]:+.3f}"
            if ci
            else ""
        )
        table.add_row("score difference", f"{found.difference.mean:+.3f}", spread)
        table.add_row("total scores", f"{found.totals[0]:.1f} : {found.totals[1]:.1f}", "")
    if found.relative is not None:
        ci = found.relative_ci95
        table.add_row("relative score", f"{found.relative:.3f}", f"{ci[0]:.3f} to {ci[1]:.3f}" if ci else "")
    for name, (ours, theirs) in found.aspects.items() if len(found.aspects) > 1 else ():
        table.add_row(name, f"{ours:.2f} : {theirs:.2f}", "")
    return table


def _percent(part: Share) -> tuple[str, str]:
    if part.share is None or part.ci95 is None:
        return "-", ""
    return f"{100 * part.share:.1f}%", f"{100 * part.ci95[0]:.1f} to {100 * part.ci95[1]:.1f}%"


def _notes(found: Comparison) -> list[str]:
    read = found.ratings - sum(found.unread.values())
    lines = [f"{found.judged} of {found.questions} pairs judged; {read} of {found.ratings} ratings read."]
    lines += [f"  {count} without scores: {reason}" for reason, count in sorted(found.unread.items())]
    if not found.both_orders:
        lines.append("Judged in one order, ours first: a liking for the first place counts as quality.")
    if found.position_bias:
        lines.append(f"The answer shown first scored {found.position_bias:+.3f} over the second, on average.")
    return lines
