"""The judge that an experiment's `[judge]` describes, and the cost of asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedloom.data.example import Example
from fedloom.errors import ConfigError
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
from fedloom.evaluation.endpoint import Endpoint, Estimate, Prices, estimate_cost
from fedloom.evaluation.judge import Judge, missing
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.settings import ByEndpoint, ByLikelihood, ByRule, Experiment, JudgedBy
from fedloom.experiment.settings import Judge as Settings


def judged_by(settings: Settings, questions: Sequence[Example]) -> JudgedBy:
    """The judge where the settings leave it open: the rule if every question has one, else the likelihood."""
    return settings.by or (ByRule() if all(q.rule for q in questions) else ByLikelihood())


def build(by: JudgedBy, experiment: Experiment, machine: Machine) -> Judge:
    """The judge that the settings describe; `machine` is the experiment's own."""
    if isinstance(by, ByRule):
        return RuleJudge()
    if isinstance(by, ByLikelihood):
        ruler = machine if by.model is None else _machine(experiment, by.model, by.max_length)
        return LikelihoodJudge(ruler.engine, ruler.template.reading_all(), ruler.base_hash)
    rubric = RUBRICS[by.rubric]
    text = shipped_prompt(rubric) if by.prompt is None else load_prompt(Path(by.prompt))
    if isinstance(by, ByEndpoint):
        writer: Any = Endpoint(
            by.url,
            by.model,
            by.key_variable,
            temperature=by.temperature,
            max_tokens=by.max_tokens,
            timeout=by.timeout,
            concurrency=by.concurrency,
            per_minute=by.per_minute,
        )
    else:
        other = _machine(experiment, by.model, by.max_length)
        writer = LocalModel(
            other.engine,
            other.template,
            other.base_hash,
            max_new_tokens=by.max_tokens,
            temperature=by.temperature,
            seed=experiment.seed,
        )
    return PromptJudge(writer, rubric, text)


def how(settings: Settings) -> dict[str, Any]:
    """How many times the judge is asked."""
    by = settings.by or ByRule()
    again = {} if isinstance(by, ByRule | ByLikelihood) else {"repeats": by.repeats, "retries": by.retries}
    return {"both_orders": settings.both_orders, **again}


def tell_cost(
    settings: Settings,
    the_judge: Judge,
    shown: Sequence[tuple[Sequence[Example], Sequence[str], Sequence[str]]],
    kept: Cache,
    *,
    agreed: bool,
    say: Callable[[str], None],
) -> None:
    """Say what an endpoint would be asked and what that costs.

    Raises: ConfigError, unless it is free or agreed to.
    """
    by = settings.by
    if not isinstance(by, ByEndpoint) or not isinstance(the_judge, PromptJudge):
        return
    asked = [s for pair in shown for s in missing(the_judge, *pair, cache=kept, **how(settings))]
    prices = None if by.price_in is None or by.price_out is None else Prices(by.price_in, by.price_out)
    cost = estimate_cost(
        [the_judge.words(s) for s in asked], max_tokens=by.max_tokens, retries=by.retries, prices=prices
    )
    say(cost_in_words(cost))
    if not cost.is_free and not agreed:
        raise ConfigError(
            "Nothing was sent. Add --yes to `fedloom judge` to go ahead, or give a price of 0: --price-in 0 --price-out 0."
        )


def cost_in_words(cost: Estimate) -> str:
    if cost.calls == 0:
        return "Every verdict is stored already: no requests."
    size = f"{cost.calls} requests, about {cost.prompt_tokens:,} tokens to send and at most {cost.reply_tokens:,} to receive"
    if cost.cost is None:
        return f"{size}; the cost is unknown without the prices of both prompt and reply tokens."
    return (
        f"{size}: about {cost.cost:,.4f}, at most {cost.most:,.4f} if malformed replies are asked for again."
    )


def _machine(experiment: Experiment, model: str, max_length: int) -> Machine:
    plain = experiment.plain()
    return load_machine(
        experiment.with_(model={**plain["model"], "base": model}, prompt={"max_length": max_length})
    )
