"""fedloom describe: what would run, what would travel and what that needs, before anything runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.arguments import Overrides, What, first_is_override, load_what, look_at_data
from fedloom.cli.console import complain, counted, notes, out, say, size
from fedloom.errors import FedloomError

if TYPE_CHECKING:
    from fedloom.experiment.plan import Plan
    from fedloom.experiment.settings import Experiment


def command(
    what: What = "quickstart",
    overrides: Overrides = None,
    all: Annotated[
        bool, typer.Option("--all", help="Also print every setting with its value, as a TOML file.")
    ] = False,
) -> None:
    """Say in ten lines what would happen: who trains what, how long, what travels, memory. Trains nothing.

    Exits with 2 and the reason if the run could not finish; everything that is known is printed all the same.
    """
    from rich.syntax import Syntax
    from rich.table import Table

    experiment = load_what(what, overrides)
    told = False
    try:
        look_at_data(experiment)
    except (FedloomError, OSError) as unread:
        complain(str(unread))  # at once; the rest takes seconds
        told = True
    from fedloom.experiment.plan import plan

    p = plan(experiment)
    if p.problem is not None and not told:
        complain(p.problem)
    notes(p.notes)
    say(_headline(experiment, p))
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for name, line in _lines(experiment, p):
        table.add_row(name, line)
    out.print(table)
    if all:
        out.print(Syntax(experiment.to_toml(), "toml", background_color="default", word_wrap=True))
    else:
        what, changes = first_is_override(what, overrides)
        say(f"Every setting and its default: {shlex.join(['fedloom', 'describe', what, *changes, '--all'])}")
    if p.problem is not None:
        raise typer.Exit(2)


def _headline(experiment: Experiment, p: Plan) -> str:
    clients = experiment.data.clients
    who = counted(clients, "client") if clients else "the clients"
    return (
        f"{experiment.name}: {who} tune {experiment.model.base} by {experiment.algorithm.title}, "
        f"in {counted(experiment.rounds, 'round')} of {p.cohort:g}; seed {experiment.seed}"
    )


def _lines(experiment: Experiment, p: Plan) -> Iterator[tuple[str, str]]:
    local, adapter, evaluation, data = (
        experiment.local,
        experiment.adapter,
        experiment.evaluation,
        experiment.data,
    )
    yield "base model", f"{p.base_parameters:,} parameters, frozen"
    yield (
        "adapter",
        f"LoRA of rank {adapter.rank} on {p.targets} layers: {p.adapter_parameters:,} parameters to train",
    )
    much = (
        f"{experiment.examples_per_round:,} examples"
        if experiment.examples_per_round
        else counted(local.epochs, "epoch")
    )
    yield (
        "a round",
        f"{much} with each client, in batches of {local.batch_size}, {local.optimizer} at {local.learning_rate:g} ({local.schedule})",
    )
    yield "split", f"{data.source}, {_named(experiment.plain()['data']['partition'])}"
    for line in p.data or ["could not be read"]:
        yield "data", line
    yield (
        "travels",
        f"{size(p.bytes_up)} up, {size(p.bytes_down)} down per client and round; {size(p.rounds * p.cohort * (p.bytes_up + p.bytes_down))} per run",
    )
    if p.disk:
        yield "disk", f"up to {size(p.disk)} for the kept rounds and the adapter"
    yield (
        "memory",
        f"about {size(p.memory)}, with {counted(p.width, 'client')} in one batch and {p.tokens_per_pass:,} tokens in a pass",
    )
    yield "workers", _workers(p)
    questions = (
        "all held-out questions"
        if evaluation.answers is None
        else counted(evaluation.answers, "held-out question")
    )
    yield (
        "in the end",
        f"{questions} answered in up to {counted(evaluation.max_new_tokens, 'token')}"
        if evaluation.answers != 0
        else "held-out loss only, no answers",
    )
    rows = [
        "local-only",
        *experiment.compare.local_labels,
        *experiment.compare.methods,
        "federated",
        "centralised",
    ]
    yield "compare", f"fedloom compare: {', '.join(rows)} over {counted(experiment.compare.seeds, 'seed')}"


def _workers(p: Plan) -> str:
    """How this machine divides a round, and which setting would use more of it."""
    mine = f"{counted(p.workers, 'worker')} of {counted(p.threads, 'thread')}; a round is {counted(p.batches, 'group')} of clients"
    idle = p.cores - p.workers * p.threads
    if idle < 1 or p.workers < p.batches or p.width < 2:
        return mine
    return (
        f"{mine}, too few for {counted(p.cores, 'core')}: machine.clients_per_batch={p.width // 2} would make more groups "
        "and change results by rounding; a comparison trains other rows meanwhile"
    )


def _named(choice: dict[str, Any]) -> str:
    kind, *options = choice.items()
    return ", ".join([str(kind[1]), *(f"{key} = {value}" for key, value in options)])
