"""What the algorithms that train on generated examples share: having them made, and choosing among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from fedloom.client import Client
from fedloom.errors import ConfigError
from fedloom.messages import Broadcast
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, Score, Scored, Steps


class Synthesis(Protocol):
    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def counts(self) -> Mapping[str, int]: ...
    def samples(self) -> Mapping[str, Any]: ...


# (a client's examples, the generator, *, stream) -> what was generated from them
Synthesizer = Callable[..., Steps[Any]]
# an example -> its response after its instruction, and the same response alone, as an engine scores them
Contrast = Callable[[Any], tuple[Any, Any]]

Rule = Literal["ifs", "ifd", "perplexity", "first"]
FATES = "synthetic/"  # prefix of the metrics that count candidates by fate
SHORTEST_RESPONSE = 4  # tokens; the score of a shorter one is noise


def synthetic_examples(
    client: Client, generator: AdapterState, message: Broadcast, synthesize: Synthesizer, *, every: int = 1
) -> Steps[list[Any]]:
    """Generated examples: new ones every so many rounds (0: only once), kept in the client's memory between.

    Memory holds them as JSON values ("synthetic"), with the round, the counts by fate and a few samples
    of each; they are rebuilt from there in every round, so that a resumed run sees what this one sees.
    """
    made = client.memory.get("synthetic")
    if made is None or 0 < every <= message.round - made["round"]:
        found: Synthesis = yield from synthesize(
            client.examples, generator, stream=(client.id, message.round)
        )
        made = {
            "round": message.round,
            "examples": [plain(e) for e in found.examples],
            "counts": dict(found.counts),
            "samples": found.samples(),
        }
        client.memory["synthetic"] = made
    return [type(client.examples[0])(**fields) for fields in made["examples"]]


def plain(example: Any) -> dict[str, Any]:
    """An example's fields as JSON values; a tuple of records, such as a conversation's earlier turns, is a list there."""
    fields = asdict(example)
    records = {
        name
        for name, value in fields.items()
        if isinstance(value, tuple) and all(isinstance(v, dict) for v in value)
    }
    return {name: list(value) if name in records else value for name, value in fields.items()}


def synthesis_metrics(client: Client, message: Broadcast) -> dict[str, float]:
    """How many candidates met which fate, in a round that made any. No algorithm reports them: a fate is a fact
    about private text, to which candidates are compared."""
    made = client.memory["synthetic"]
    if made["round"] != message.round:
        return {}
    return {FATES + fate: float(count) for fate, count in made["counts"].items()}


def fit_anew(
    client: Client,
    adapter: AdapterState,
    examples: Sequence[Any],
    *,
    round: int,
    purpose: str,
    **options: Any,
) -> Steps[Fitted]:
    """Train on a set that lasts for one round: all of its epochs, in an order of its own.

    `Client.fit` goes on where the last round stopped, which has no meaning for examples that are new. On
    no examples at all, training is doing nothing.
    """
    if not examples:
        return Fitted(adapter, 0, 0, 0, 0.0, math.nan)
    fitted: Fitted = yield Fit(
        adapter,
        examples,
        local=client.local.at(round),
        seed=client.seed,
        stream=(client.id, purpose, round),
        **options,
    )
    return fitted


@dataclass(frozen=True)
class Judged:
    """A candidate under the scorer: mean nats per response token, after its instruction and alone."""

    given: float
    alone: float
    usable: bool  # both finite, and the response long enough to say something

    @property
    def ratio(self) -> float:
        """The instruction-following score L(y|x) / L(y): below 1 where the instruction helps."""
        return self.given / self.alone


def judge(examples: Sequence[Any], scorer: AdapterState, contrast: Contrast) -> Steps[list[Judged]]:
    """Score every response with and without its instruction, in one request."""
    if not examples:
        return []
    pairs = [contrast(e) for e in examples]
    scored: list[Scored] = yield Score([given for given, _ in pairs] + [alone for _, alone in pairs], scorer)
    return [_judged(*pair) for pair in zip(scored[: len(pairs)], scored[len(pairs) :], strict=True)]


def _judged(given: Scored, alone: Scored) -> Judged:
    usable = (
        given.targets == alone.targets >= SHORTEST_RESPONSE
        and math.isfinite(given.nll)
        and math.isfinite(alone.nll)
        and alone.nll > 0
    )
    return Judged(given.nll / max(given.targets, 1), alone.nll / max(alone.targets, 1), usable)


def ranked(judged: Sequence[Judged], rule: Rule = "ifs") -> list[int]:
    """Indices of the usable candidates, best first.

    "ifs": lowest instruction-following score first (FedPIT). "ifd": exactly the reverse, the order of
    instruction-following difficulty (Li et al. 2023, https://arxiv.org/abs/2308.12032). "perplexity":
    lowest L(y|x) first. "first": as generated; scores only decide what is usable.
    """
    usable = [i for i, j in enumerate(judged) if j.usable]
    match rule:
        case "ifs":
            return sorted(usable, key=lambda i: (judged[i].ratio, i))
        case "ifd":
            return ranked(judged, "ifs")[::-1]
        case "perplexity":
            return sorted(usable, key=lambda i: (judged[i].given, i))
        case "first":
            return usable
        case _:
            raise ConfigError(f"Expected rule = ifs, ifd, perplexity or first, got {rule!r}.")


@dataclass(frozen=True)
class Selection:
    examples: list[Any]
    metrics: Mapping[str, float]


def select(
    candidates: Sequence[Any],
    scorer: AdapterState,
    contrast: Contrast,
    *,
    keep: int,
    rule: Rule,
    drop_unhelpful: bool,
) -> Steps[Selection]:
    """The best `keep` of the candidates under the scorer."""
    judged = yield from judge(candidates, scorer, contrast)
    order = ranked(judged, rule)
    unhelpful = [i for i in order if judged[i].ratio >= 1]
    chosen = [i for i in order if not (drop_unhelpful and i in unhelpful)][:keep]
    metrics = {"selected": float(len(chosen)), "unusable": float(len(judged) - len(order))}
    if order:
        metrics["unhelpful_share"] = len(unhelpful) / len(order)
    if chosen:
        metrics["score"] = math.fsum(judged[i].ratio for i in chosen) / len(chosen)
    return Selection([candidates[i] for i in chosen], metrics)
