"""fedloom judge: a run's answers against somebody else's, pair by pair, in both orders."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import err, out
from fedloom.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from fedloom.config import Experiment
    from fedloom.data.example import Example
    from fedloom.evaluation.endpoint import Estimate
    from fedloom.evaluation.pairwise import Comparison, Share
    from fedloom.experiment import Machine


class Kind(StrEnum):
    rule = "rule"
    likelihood = "likelihood"
    local = "local"
    endpoint = "endpoint"


class RubricName(StrEnum):
    aspects = "aspects"
    total = "total"


def command(
    run: RunFolder,
    overrides: Overrides = None,
    against: Annotated[str, typer.Option(help="The opponent: base, reference (the held-out responses), or a JSONL file of answers.")] = "base",
    field: Annotated[str, typer.Option(help="The field of that file that holds the answer.")] = "answer",
    judge: Annotated[Kind | None, typer.Option(help="Who judges. Default: the rule where every question has one, else likelihood.")] = None,
    rubric: Annotated[RubricName, typer.Option(help="For a judge asked in words: FedPIT's four aspects 1-5, or FedIT's total 1-10.")] = RubricName.aspects,
    prompt: Annotated[Path | None, typer.Option(help="Your own words for the judge, a text file. Default: ours.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many held-out questions. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Ratings of each pair in each order.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a malformed reply is asked for again.")] = 2,
    model: Annotated[str | None, typer.Option(help="The judge's model: a folder or a Hugging Face id, or the endpoint's name for it. Default for likelihood: the run's base.")] = None,
    url: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible endpoint. Nothing is sent unless this is given.")] = None,
    key_variable: Annotated[str | None, typer.Option(help="The environment variable that holds the endpoint's key.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the judge's replies.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply of the judge.")] = 400,
    max_length: Annotated[int, typer.Option(min=32, help="Tokens that a local judge reads and writes.")] = 2048,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 60.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    per_minute: Annotated[float | None, typer.Option(help="Most requests a minute. Default: no limit.")] = None,
    price_in: Annotated[float | None, typer.Option(min=0.0, help="Price of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0.0, help="Price of a million reply tokens.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Go ahead although it costs money, or nobody knows how much.")] = False,
) -> None:  # fmt: skip
    """Compare a run's answers with its base's, or with stored ones: win, tie, lose, both orders averaged.

    Answers and verdicts are kept under RUN/judge: an interrupted evaluation goes on, a repeated one asks nothing.
    """
    experiment = load_finished(run, overrides)
    from fedloom.evaluation.backends import (
        RUBRICS,
        LikelihoodJudge,
        LocalModel,
        PromptJudge,
        RuleJudge,
        load_prompt,
        shipped_prompt,
    )
    from fedloom.evaluation.cache import Cache
    from fedloom.evaluation.endpoint import Endpoint, Prices, estimate_cost
    from fedloom.evaluation.judge import Judge, compare, missing
    from fedloom.evaluation.opponents import answers_of, stored_answers
    from fedloom.experiment import load_data, load_machine
    from fedloom.results import write_json
    from fedloom.simulate import adapter_of

    test = _some(load_data(experiment).test, questions)
    kind = judge or (Kind.endpoint if url else Kind.rule if all(e.rule for e in test) else Kind.likelihood)
    if (kind is Kind.endpoint) != (url is not None):
        raise ConfigError("--judge endpoint and --url belong together: expected both, or neither.")
    if kind in (Kind.endpoint, Kind.local) and model is None:
        raise ConfigError(f"--judge {kind.value} needs --model. Expected the name of the judge's model.")
    machine = load_machine(experiment)

    words = RUBRICS[rubric.value]
    text = shipped_prompt(words) if prompt is None else load_prompt(prompt)
    the_judge: Judge
    match kind:
        case Kind.rule:
            the_judge = RuleJudge()
        case Kind.likelihood:
            ruler = machine if model is None else _judge_machine(experiment, model, max_length)
            the_judge = LikelihoodJudge(ruler.engine, ruler.template, ruler.base_hash)
        case Kind.local:
            other = _judge_machine(experiment, str(model), max_length)
            writer = LocalModel(other.engine, other.template, other.base_hash, max_new_tokens=max_tokens, temperature=temperature)
            the_judge = PromptJudge(writer, words, text)
        case Kind.endpoint:
            endpoint = Endpoint(
                str(url), str(model), key_variable, temperature=temperature, max_tokens=max_tokens, timeout=timeout,
                concurrency=concurrency, per_minute=per_minute,
            )  # fmt: skip
            the_judge = PromptJudge(endpoint, words, text)

    rows = {"run": adapter_of(run, machine)} | ({"base": None} if against == "base" else {})
    said = answers_of(
        machine.engine, machine.template, test, rows, weights=machine.base_hash,
        max_new_tokens=experiment.evaluation.max_new_tokens, cache=Cache(run / "judge" / "answers.jsonl"),
    )  # fmt: skip
    if against == "base":
        theirs = said["base"]
    elif against == "reference":
        theirs = [e.response for e in test]
    else:
        theirs = stored_answers(Path(against), test, field=field)

    kept = Cache(run / "judge" / "verdicts.jsonl")
    if kind is Kind.endpoint and isinstance(the_judge, PromptJudge):
        prices = None if price_in is None or price_out is None else Prices(price_in, price_out)
        asked = missing(the_judge, test, said["run"], theirs, cache=kept, repeats=repeats, retries=retries)
        cost = estimate_cost([the_judge.words(s) for s in asked], max_tokens=max_tokens, retries=retries, prices=prices)
        err.print(_cost(cost), highlight=False, soft_wrap=True)
        if not cost.is_free and not yes:
            raise ConfigError("Nothing was sent. Add --yes to go ahead, or tell a price of 0: --price-in 0 --price-out 0.")
    found = compare(the_judge, test, said["run"], theirs, cache=kept, repeats=repeats, retries=retries)
    identity = {name: value for name, value in the_judge.identity.items() if name != "prompt"}
    write_json(run / "judge.json", {"against": against, "judge": identity, **found.plain()})
    out.print(_table(found, f"run against {against}, judged by {kind.value}"))
    for line in _notes(found):
        out.print(line, highlight=False, soft_wrap=True)
    out.print(f"Wrote {run / 'judge.json'}", highlight=False, soft_wrap=True)
    if found.judged == 0:
        raise RunError("No pair could be judged; the reasons are listed above. Mend that and give the same command again.")


def _some(test: Any, count: int | None) -> list[Example]:
    """At equal steps, since held-out examples lie group by group."""
    if count is None or count >= len(test):
        return list(test)
    return [test[i * len(test) // count] for i in range(count)]


def _judge_machine(experiment: Experiment, model: str, max_length: int) -> Machine:
    from fedloom.experiment import load_machine

    plain = experiment.plain()
    return load_machine(experiment.with_(model={**plain["model"], "base": model}, prompt={"max_length": max_length}))


def _cost(cost: Estimate) -> str:
    if cost.calls == 0:
        return "Every verdict is kept already: no request."
    size = f"{cost.calls} requests, about {cost.prompt_tokens:,} tokens to send and at most {cost.reply_tokens:,} to receive"
    if cost.cost is None:
        return f"{size}; the cost is unknown without --price-in and --price-out."
    return f"{size}: about {cost.cost:,.4f}, at most {cost.most:,.4f} if malformed replies are asked for again."


def _table(found: Comparison, title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("run", justify="right")
    table.add_column("95% interval", justify="right")
    shares = (("win", found.win), ("tie", found.tie), ("lose", found.lose), ("win or tie", found.win_or_tie),
              ("orders disagree", found.order_disagreement))  # fmt: skip
    for name, part in shares:
        table.add_row(name, *_percent(part))
    if found.difference is not None:
        ci = found.difference.ci95
        table.add_row("score difference", f"{found.difference.mean:+.3f}", f"{ci[0]:+.3f} to {ci[1]:+.3f}" if ci else "")
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
    if found.position_bias is not None and found.order_disagreement.count:
        lines.append(f"The answer shown first scored {found.position_bias:+.3f} over the second, on average.")
    return lines
