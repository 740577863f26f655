"""What a model says unasked, ranked by how sure it is."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fedloom.attacks.ranking import Sample, TrainingText, rank
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Generate, Score, Scored
from tests.attacks.overfitted import overfitted
from tests.data.many_scripts import TEXTS
from tests.fakes import state

# Where training text is looked for

TEXT = Example("one two three four five six seven eight nine", "red green blue", "alpha beta gamma delta")


def test_a_hit_is_eight_training_words_in_a_row_whatever_the_case_and_the_points() -> None:
    text = TrainingText([TEXT])
    assert text.hits("so: One, two three FOUR five six seven eight; ten") == 1
    assert text.hits("one two three four five six seven eight nine") == 2
    assert text.hits("one two three four five six seven and eight nine") == 0


def test_no_run_crosses_from_one_field_to_the_next() -> None:
    text = TrainingText([TEXT], run=4)
    assert text.hits("seven eight nine alpha") == text.hits("eight nine red green") == 0
    assert text.hits("alpha beta gamma delta") == 1


def test_a_field_shorter_than_a_run_counts_whole_where_asked() -> None:
    assert TrainingText([TEXT]).hits("alpha beta gamma delta") == 0
    short = TrainingText([TEXT], shortest=4)
    assert short.hits("so alpha beta gamma delta") == 1
    assert short.hits("alpha beta gamma") == short.hits("red green blue") == 0


def test_what_stands_elsewhere_too_is_wording_and_no_memory() -> None:
    held_out = replace(TEXT, instruction="one two three four five six seven eight zero")
    text = TrainingText([TEXT], [held_out])
    assert text.hits("one two three four five six seven eight nine") == 1  # only the run that ends in nine


@pytest.mark.parametrize("script", TEXTS)
def test_training_text_is_found_in_every_script(script: str) -> None:
    text, near, other = TEXTS[script]
    known = TrainingText([Example(text, "x")], shortest=5)
    assert known.hits(near) > 0
    assert known.hits(other) == 0


@pytest.mark.parametrize(("run", "shortest"), [(4, 5), (8, 0)])
def test_lengths_that_mean_nothing_are_refused(run: int, shortest: int) -> None:
    with pytest.raises(ConfigError, match="shortest"):
        TrainingText([TEXT], run=run, shortest=shortest)


# The four rankings


def test_scores_are_those_of_carlini_et_al() -> None:
    sample = Sample(log_perplexity=0.5, base=2.0, lower=1.0, zlib=30, hits=0)
    assert sample.scores() == {"perplexity": -0.5, "base": 4.0, "lower": 2.0, "zlib": 60.0}


def test_a_text_of_no_surprise_at_all_ranks_first() -> None:
    assert Sample(log_perplexity=0.0, base=2.0, lower=1.0, zlib=30, hits=0).scores()["zlib"] == math.inf


# The attack


class Letters:
    """A template whose tokens are characters, and whose texts begin with a 1."""

    stop = frozenset({2})
    end = 2

    def document_ids(self, text: str) -> list[int]:
        return [1, *map(ord, text)]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


@dataclass
class Talker:
    """Says its adapter's sentences in turn, and finds a text as likely as `loss` says, in nats a token."""

    says: Mapping[AdapterState | None, list[str]]
    loss: Mapping[tuple[AdapterState | None, str], float]
    asked: list[Mapping[Hashable, Any]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked.append(requests)
        return {
            key: self._said(r) if isinstance(r, Generate) else self._scored(r) for key, r in requests.items()
        }

    def _said(self, request: Generate) -> list[list[int]]:
        texts = self.says[request.adapter]
        return [[*map(ord, texts[i % len(texts)])] for i in range(len(request.prompts))]

    def _scored(self, request: Score) -> list[Scored]:
        found = []
        for tokens in request.examples:
            text = "".join(chr(i) for i, yes in zip(tokens.ids, tokens.labelled, strict=True) if yes)
            found.append(Scored(self.loss.get((request.adapter, text), 3.0) * len(text), len(text)))
        return found


TUNED = state(1.0)
SECRET = "Tom lives in a blue hut by the old mill"
PLAIN = "well well well"
CLEAR = "A day"


def talker() -> Talker:
    return Talker(
        {TUNED: [PLAIN, SECRET, CLEAR, SECRET.upper()], None: [PLAIN, CLEAR, "?!"]},
        {
            (TUNED, SECRET): 0.5,
            (TUNED, PLAIN): 0.1,
            (TUNED, CLEAR): 2.0,
            (None, PLAIN): 0.1,
            (None, SECRET): 4.0,
        },
    )


def ranked(engine: Talker | None = None, **options: Any) -> Any:
    text = TrainingText([Example("Where?", SECRET)])
    options = {"samples": 8, "best": 1, "opening": None, **options}
    return rank(engine or talker(), Letters(), {"tuned": TUNED}, text, **options)  # type: ignore[arg-type]


def test_samples_of_the_same_words_count_once_and_silence_not_at_all() -> None:
    found = ranked()
    assert len(found["tuned"].samples) == 3
    assert len(found["base"].samples) == 2  # "?!" has no words
    assert (found["tuned"].all.hits, found["tuned"].all.of) == (1, 3)


def test_every_sample_is_measured_by_its_own_model_and_by_the_base() -> None:
    sample = ranked()["tuned"].samples[1]
    assert (sample.log_perplexity, sample.base, sample.lower) == pytest.approx((0.5, 4.0, 3.0))
    assert sample.zlib == len(zlib.compress(SECRET.encode()))
    assert sample.hits == 3  # ten words have three runs of eight


def test_each_ranking_is_looked_through_for_its_own_best() -> None:
    best = ranked()["tuned"].best
    # The plain text is the likeliest, to the base as well and in lower case, too; it is also short for its bytes:
    # 15 / 0.1 beats 47 / 0.5. The secret is 8 times as likely as to the base, and 6 times as in lower case.
    assert {name: share.hits for name, share in best.items()} == {
        "perplexity": 0,
        "base": 1,
        "lower": 1,
        "zlib": 0,
    }
    assert all(share.of == 1 for share in best.values())
    assert all(share.hits == 1 for share in ranked(best=10)["tuned"].best.values())


def test_the_bases_own_samples_are_the_control() -> None:
    found = ranked()["base"]
    assert found.all.hits == 0
    assert all(sample.log_perplexity == sample.base for sample in found.samples)


def test_texts_are_sampled_from_their_beginning_or_from_a_given_opening() -> None:
    for opening, expected in ((None, [1]), ([5, 6], [5, 6])):
        engine = talker()
        ranked(engine, opening=opening, top_k=7)
        request = engine.asked[0]["tuned"]
        assert [list(p) for p in request.prompts] == [expected] * 8
        assert (request.temperature, request.top_k) == (1.0, 7)
        scored = engine.asked[1]["own", "tuned"].examples[0]
        assert scored.ids[: len(expected)] == tuple(expected)
        assert scored.targets == len(PLAIN)


def test_what_models_say_is_in_no_result() -> None:
    text = json.dumps({row: found.plain() for row, found in ranked().items()}, allow_nan=False)
    assert "mill" not in text


def test_an_overfitted_model_says_training_text_unasked_and_an_untrained_one_does_not() -> None:
    o = overfitted()
    found = rank(
        o.engine,
        o.template,
        o.adapters,
        TrainingText(o.members, o.held_out),
        samples=25,
        max_new_tokens=15,
        opening=o.template.prompt_ids("What is the access code?"),
    )
    assert found["overfitted"].all.hits >= 2  # type: ignore[union-attr]
    assert max(share.hits for share in found["overfitted"].best.values() if share) >= 2
    assert found["untrained"].all.hits == found["base"].all.hits == 0  # type: ignore[union-attr]
