"""Untargeted extraction: sample from a model, rank the samples by its confidence, find training text in them.

Carlini et al. 2021 (arXiv 2012.07805): sample many texts, rank them by signs of memorisation, inspect the
best of each ranking. The inspector here is an index of the training set's word runs. The untuned base takes
the place of their smaller reference model; it never saw the clients' data. Its own samples, ranked alike, are
the control: their hits are common wording.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.attacks.targets import with_base
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import length, runs, words
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.statistics import Proportion, share
from fedloom.steps import Engine, Generate, Score, Scored, Tokens

RUN = 8  # words in a row that two texts do not share by chance


class TrainingText:
    """The training set's runs of `run` words in a row, or whole fields if shorter; never across fields.

    In scripts without spaces two characters count as a word.

    Runs that also occur in `elsewhere`, such as held-out examples, are common wording and not memory: they do
    not count. Fields of fewer than `shortest` words (None: a run's) are ignored.
    """

    def __init__(
        self,
        training: Sequence[Example],
        elsewhere: Sequence[Example] = (),
        *,
        run: int = RUN,
        shortest: int | None = None,
    ):
        shortest = run if shortest is None else shortest
        if not 1 <= shortest <= run:
            raise ConfigError(f"Expected 1 <= {shortest=} <= {run=} words.")
        common = {piece for e in elsewhere for piece in _pieces(e, run, shortest)}
        self._pieces = {piece for e in training for piece in _pieces(e, run, shortest)} - common
        self._lengths = sorted({len(piece) for piece in self._pieces})

    def hits(self, text: str) -> int:
        """How many different runs of the training set a text contains."""
        said = words(text)
        return len(
            {tuple(said[i : i + n]) for n in self._lengths for i in range(len(said) - n + 1)} & self._pieces
        )


def _pieces(example: Example, run: int, shortest: int) -> Iterator[tuple[str, ...]]:
    for field in example.texts:
        said = words(field)
        if (whole := length(said)) >= shortest:
            yield from runs(said, min(run, whole))


@dataclass(frozen=True)
class Sample:
    """The figures of one text that a model made; the text itself is not kept."""

    log_perplexity: float  # nats per token, under the model that made it
    base: float  # the same under the untuned base
    lower: float  # the same of the lower-cased text, under the model that made it
    zlib: int  # bytes of the text, compressed
    hits: int  # runs of the training set in it

    def scores(self) -> dict[str, float]:
        """Every ranking's score; the higher, the more suspicious."""
        return {
            "perplexity": -self.log_perplexity,
            "base": _ratio(self.base, self.log_perplexity),
            "lower": _ratio(self.lower, self.log_perplexity),
            "zlib": _ratio(self.zlib, self.log_perplexity),
        }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


@dataclass(frozen=True)
class Ranked:
    """How much training text one model's samples hold."""

    best: Mapping[str, Proportion | None]  # ranking -> share of its best samples that hold training text
    all: Proportion | None  # the same of all different samples, unranked
    samples: tuple[Sample, ...]

    def plain(self) -> dict[str, Any]:
        return {
            "best": {name: found and asdict(found) for name, found in self.best.items()},
            "all": self.all and asdict(self.all),
            "samples": len(self.samples),
        }


def rank(
    engine: Engine,
    template: Template,
    adapters: Mapping[str, AdapterState | None],
    text: TrainingText,
    *,
    samples: int,
    best: int = 10,
    max_new_tokens: int = 256,
    top_k: int | None = 40,
    opening: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Ranked]:
    """Sample from every model and the untuned base (row "base"), score, rank, inspect.

    A text starts with `opening`; None is the beginning of a text. A model tuned on responses alone never
    trained on text at that place: give it the opening of its prompt format. Samples with the same words
    count once. All rows draw the same random numbers.
    """
    rows = with_base(adapters)
    start = tuple(opening or template.document_ids("") or [template.end])
    made = engine.answer(
        {
            row: Generate(
                [start] * samples,
                adapter,
                max_new_tokens=max_new_tokens,
                stop=template.stop,
                temperature=1.0,
                top_k=top_k,
                stream=("attacks", "ranking"),
                seed=seed,
            )
            for row, adapter in rows.items()
        }
    )
    said = {row: _different(template, made[row]) for row in rows}
    lead = len(template.document_ids(""))
    exact = {row: [_after(start, ids) for ids, _ in said[row]] for row in rows}
    lower = {
        row: [_after(start, template.document_ids(t.lower())[lead:]) for _, t in said[row]] for row in rows
    }
    asked: dict[Hashable, Score] = {}
    for row, adapter in rows.items():
        asked["own", row] = Score(exact[row], adapter)
        asked["base", row] = Score(exact[row])
        asked["lower", row] = Score(lower[row], adapter)
    scored = engine.answer(asked)
    return {
        row: _ranked(
            [
                Sample(_mean(own), _mean(base), _mean(low), len(zlib.compress(t.encode())), text.hits(t))
                for (_, t), own, base, low in zip(
                    said[row], scored["own", row], scored["base", row], scored["lower", row], strict=True
                )
            ],
            best,
        )
        for row in rows
    }


def _different(template: Template, answers: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], str]]:
    """Samples with their texts: the first of each set with the same words, and none without words."""
    found: dict[tuple[str, ...], tuple[Sequence[int], str]] = {}
    for ids in answers:
        text = template.decode(ids)
        found.setdefault(tuple(words(text)), (ids, text))
    found.pop((), None)
    return list(found.values())


def _after(start: Sequence[int], ids: Sequence[int]) -> Tokens:
    return Tokens((*start, *ids), (False,) * len(start) + (True,) * len(ids))


def _mean(scored: Scored) -> float:
    return scored.nll / max(1, scored.targets)


def _ranked(samples: Sequence[Sample], best: int) -> Ranked:
    def hit(chosen: Sequence[Sample]) -> Proportion | None:
        return share(sum(s.hits > 0 for s in chosen), len(chosen))

    scores = [sample.scores() for sample in samples]
    order = {
        name: sorted(range(len(samples)), key=lambda i: -scores[i][name])[:best]
        for name in ("perplexity", "base", "lower", "zlib")
    }
    return Ranked(
        {name: hit([samples[i] for i in top]) for name, top in order.items()}, hit(samples), tuple(samples)
    )
