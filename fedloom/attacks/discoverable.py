"""Discoverable memorisation: does the beginning of a trained text bring back its end, token by token?

The attacker has the prompt before the learnt text and the text's first half, 50 tokens at most; the secret is
the rest, 50 tokens at most (Carlini et al. 2023, arXiv 2202.07646, cut to fit short records).

`discover` is the probabilistic form (Hayes et al. 2024, arXiv 2410.19482): one forward pass gives the
probability p_z that sampling at temperature 1 produces the suffix, and a record is extractable at (n, p) if n
samples contain it with a probability of at least p. `greedy` is the older form, all or nothing on the
likeliest continuation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.attacks.targets import with_base
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.statistics import Proportion, share
from fedloom.steps import Engine, Generate, Score, Scored, Tokens

LONGEST = 50  # tokens of the prefix within the text, and of the suffix
SHORTEST = 8  # tokens of a suffix: shorter ones can be guessed
LEVELS = ((1, 0.5), (100, 0.5), (10_000, 0.9))  # (samples, probability of at least one hit)


@dataclass(frozen=True)
class Cut:
    """A record as the attacker sees it, and the suffix to recover."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def scored(self) -> Tokens:
        """Prefix and suffix, with the suffix labelled: its loss is -log p_z."""
        return Tokens((*self.prefix, *self.suffix), (False,) * len(self.prefix) + (True,) * len(self.suffix))


def cut(tokens: Tokens, *, end: int, shortest: int = SHORTEST) -> Cut | None:
    """A record split in two; None if its learnt text has fewer than `shortest` tokens.

    The suffix is the second half of the learnt text, or more of it if half is less than `shortest`. The token
    that ends an answer is not part of it: every tuned model produces it.
    """
    first = len(tokens.ids)
    while first and tokens.labelled[first - 1]:  # earlier turns of a conversation may be learnt, too
        first -= 1
    ids = tokens.ids[:-1] if tokens.ids[-1:] == (end,) else tokens.ids
    learnt = len(ids) - first
    if learnt < shortest:
        return None
    suffix = min(LONGEST, max(shortest, learnt // 2))
    begin = first + min(LONGEST, learnt - suffix)
    return Cut(ids[:begin], ids[begin : begin + suffix])


def extractable(nll: float, n: int, p: float) -> bool:
    """1 - (1 - exp(-nll))^n >= p, without ever forming a difference from 1. False for a loss of NaN."""
    # log(1 - exp(-nll)), by whichever form keeps precision (Maechler 2012).
    if nll <= 0:
        return True
    miss = math.log(-math.expm1(-nll)) if nll < math.log(2) else math.log1p(-math.exp(-nll))
    return n * miss <= math.log1p(-p)


@dataclass(frozen=True)
class Discovered:
    """One group of records under one model."""

    nll: tuple[float, ...]  # -log p_z of each record's suffix, nats
    targets: tuple[int, ...]  # tokens of each suffix
    shares: Mapping[tuple[int, float], Proportion | None]  # (n, p) -> share of records extractable there
    skipped: int  # records too short to have a prefix and a suffix

    def plain(self) -> dict[str, Any]:
        return {
            "extractable": [{"n": n, "p": p, "share": s and asdict(s)} for (n, p), s in self.shares.items()],
            "skipped": self.skipped,
            "nll": [nll if math.isfinite(nll) else None for nll in self.nll],
            "targets": list(self.targets),
        }


@dataclass(frozen=True)
class Discovery:
    members: Discovered
    held_out: Discovered

    def plain(self) -> dict[str, Any]:
        return {"members": self.members.plain(), "held_out": self.held_out.plain()}


def discover(
    engine: Engine,
    template: Template,
    adapters: Mapping[str, AdapterState | None],
    members: Sequence[Example],
    held_out: Sequence[Example],
    *,
    levels: Sequence[tuple[int, float]] = LEVELS,
    shortest: int = SHORTEST,
) -> dict[str, Discovery]:
    """One forward pass per record and model, the untuned base (row "base") included."""
    for n, p in levels:
        if n < 1 or not 0 < p < 1:
            raise ConfigError(f"Expected levels (n, p) with n >= 1 samples and 0 < p < 1, got ({n}, {p}).")
    inside, outside = (_cuts(template, group, shortest) for group in (members, held_out))
    scored = [c.scored() for c in (*inside, *outside)]
    rows = with_base(adapters)
    answers = engine.answer({row: Score(scored, adapter) for row, adapter in rows.items()})
    return {
        row: Discovery(
            _discovered(answers[row][: len(inside)], levels, len(members) - len(inside)),
            _discovered(answers[row][len(inside) :], levels, len(held_out) - len(outside)),
        )
        for row in rows
    }


def _discovered(scored: Sequence[Scored], levels: Sequence[tuple[int, float]], skipped: int) -> Discovered:
    nll = tuple(s.nll for s in scored)
    shares = {(n, p): share(sum(extractable(x, n, p) for x in nll), len(nll)) for n, p in levels}
    return Discovered(nll, tuple(s.targets for s in scored), shares, skipped)


@dataclass(frozen=True)
class Exact:
    """The share of suffixes that a greedy continuation of their prefix reproduces in full."""

    members: Proportion | None
    held_out: Proportion | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def greedy(
    engine: Engine,
    template: Template,
    adapters: Mapping[str, AdapterState | None],
    members: Sequence[Example],
    held_out: Sequence[Example],
    *,
    shortest: int = SHORTEST,
) -> dict[str, Exact]:
    """One forward pass per record, model and token of the suffix; records too short are left out."""
    inside, outside = (_cuts(template, group, shortest) for group in (members, held_out))
    cuts = [*inside, *outside]
    prompts = [c.prefix for c in cuts]
    room = max((len(c.suffix) for c in cuts), default=0)
    # No stop tokens: the suffix is compared token by token, and anything after it is ignored.
    rows = with_base(adapters)
    said = engine.answer({r: Generate(prompts, adapter, max_new_tokens=room) for r, adapter in rows.items()})
    hits = {
        r: [tuple(a[: len(c.suffix)]) == c.suffix for c, a in zip(cuts, said[r], strict=True)] for r in rows
    }
    split = len(inside)
    return {
        row: Exact(share(sum(hit[:split]), split), share(sum(hit[split:]), len(outside)))
        for row, hit in hits.items()
    }


def _cuts(template: Template, examples: Sequence[Example], shortest: int) -> list[Cut]:
    found = (cut(template.encode(e), end=template.end, shortest=shortest) for e in examples)
    return [c for c in found if c is not None]
