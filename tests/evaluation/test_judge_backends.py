"""Judges without a network, with engines whose arithmetic fits on a napkin, and the two sides they compare."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedloom.data import microworld
from fedloom.data.example import Example, Turn
from fedloom.errors import ConfigError
from fedloom.evaluation.backends import (
    RUBRICS,
    LikelihoodJudge,
    LocalModel,
    PromptJudge,
    Reply,
    RuleJudge,
    load_prompt,
    shipped_prompt,
)
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.judge import Shown, compare
from fedloom.evaluation.verdicts import ASPECTS, LIKELIHOOD, RULE, TOTAL, Failed, Scores
from fedloom.steps import Generate, Score, Scored


@dataclass
class Letters:
    """A template for which every character is a token."""

    max_length: int = 200
    positions: int = 10_000
    format: str = "plain"
    system: str = ""
    loss_on: str = "response"
    stop: frozenset[int] = frozenset({0})

    def prompt_ids(self, example: Example | str, *, room: int = 0) -> list[int]:
        text = example if isinstance(example, str) else example.instruction + example.context
        return [ord(c) for c in text][: self.max_length - room]

    def contrast(self, example: Example) -> tuple[Example, Example]:
        return example, example

    def truncation(self, example: Example) -> str:
        whole = len(example.instruction + example.context + example.response) + 1 <= self.max_length
        return "none" if whole else "context"

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Engine:
    """Says `said`; a letter costs 1 nat, or 0.1 where the context holds it already."""

    said: str = "8 7"
    asked: list[Mapping[Hashable, Any]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked.append(requests)
        return {key: self._one(request) for key, request in requests.items()}

    def _one(self, request: Any) -> Any:
        if isinstance(request, Generate):
            return [[ord(c) for c in self.said] for _ in request.prompts]
        assert isinstance(request, Score)
        return [
            Scored(sum(0.1 if c in e.context else 1.0 for c in e.response), len(e.response))
            for e in request.examples
        ]


def local(engine: Engine | None = None, **options: Any) -> LocalModel:
    options = {"max_new_tokens": 10, **options}
    return LocalModel(engine or Engine(), Letters(2000), "weights", **options)  # type: ignore[arg-type]


# --- in words --------------------------------------------------------------------------------------------


def words(prompt: str, shown: Shown) -> str:
    return PromptJudge(local(), TOTAL, prompt).words(shown)


def test_a_prompt_is_filled_with_what_is_shown():
    shown = Shown(Example("Ask?", "Ref", "Context"), "A", "B")
    assert words("{question}|{first}|{second}|{reference}", shown) == "Ask?\n\nContext|A|B|Ref"


def test_an_answer_that_holds_a_slot_stays_as_it_is():
    shown = Shown(Example("{second}", ""), "{second} {question}", "B")
    assert words("{question}|{first}|{second}", shown) == "{second}|{second} {question}|B"


def test_other_braces_of_a_prompt_stay():
    assert (
        words('{"first": {x}} {question}{first}{second}', Shown(Example("Q", ""), "A", "B"))
        == '{"first": {x}} QAB'
    )


@pytest.mark.parametrize("slot", ["question", "first", "second"])
def test_a_prompt_without_a_slot_is_refused(slot):
    with pytest.raises(ConfigError, match=f"lacks {{{slot}}}"):
        PromptJudge(local(), TOTAL, "{question}{first}{second}".replace(f"{{{slot}}}", ""))


def test_a_rubric_without_words_is_refused():
    with pytest.raises(ConfigError, match="aspects, total"):
        PromptJudge(local(), RULE, "{question}{first}{second}")


def test_a_prompt_of_ones_own_is_read_from_a_file(tmp_path: Path):
    (tmp_path / "p.txt").write_text("Größe {question}", "utf-8")
    assert load_prompt(tmp_path / "p.txt") == "Größe {question}"


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_prompt_that_cannot_be_read_is_named(tmp_path: Path, name):
    with pytest.raises(ConfigError, match="judge's prompt"):
        load_prompt(tmp_path / name)


def test_another_prompt_is_another_judge():
    texts = ["{question}{first}{second}", "{question} {first} {second}"]
    assert len({json.dumps(dict(PromptJudge(local(), TOTAL, t).identity)) for t in texts}) == 2


def test_a_local_model_judges_in_words():
    judge = PromptJudge(local(Engine("8 7\nSo.")), TOTAL, shipped_prompt(TOTAL))
    found = compare(judge, [Example("Q?", "")], ["A"], ["B"], cache=Cache())
    assert (found.tie.count, found.order_disagreement.count) == (1, 1)  # it always prefers the first


def test_a_local_model_that_cannot_judge_is_counted_not_guessed():
    judge = PromptJudge(
        local(Engine("Once there was a fox."), temperature=1.0), ASPECTS, shipped_prompt(ASPECTS)
    )
    found = compare(judge, [Example("Q?", "")], ["A"], ["B"], cache=Cache())
    assert (found.judged, found.unread) == (0, {"malformed reply": 2})


def test_a_prompt_that_does_not_fit_fails_instead_of_being_cut():
    writer = local()
    room = writer.template.max_length - writer.max_new_tokens
    said = dict(writer.write({"fits": "x" * room, "too long": "x" * (room + 1), "far too long": "x" * 5000}))
    assert said["fits"] == Reply("8 7", room, 3)
    assert said["too long"] == said["far too long"] == Failed("prompt longer than the judge's max_length")


def test_sampled_replies_hang_on_their_key_alone():
    engine = Engine()
    list(local(engine, temperature=0.7).write({f"key {i}": "p" for i in range(20)}))
    sent = {key: r for requests in engine.asked for key, r in requests.items()}
    assert {r.stream for r in sent.values()} == {("judge", f"key {i}") for i in range(20)}


def test_a_greedy_local_model_never_varies():
    assert [local(temperature=t).varies for t in (0.0, 0.5)] == [False, True]


# --- by rule ---------------------------------------------------------------------------------------------


def test_the_rule_judge_finds_the_right_answer():
    questions = microworld.corpus(examples=16, seed=3)
    right = [e.response for e in questions]
    found = compare(RuleJudge(), questions, right, ["wrong"] * 16, cache=Cache())
    assert (found.win.count, found.totals, found.order_disagreement.count) == (16, (16.0, 0.0), 0)
    assert found.relative is None  # nothing to divide by


def test_two_right_answers_tie():
    [question] = [Example("Q?", "It is Monday.", rule="exact")]
    assert (
        compare(RuleJudge(), [question], ["It is Monday."], ["It  is Monday. "], cache=Cache()).tie.count == 1
    )


def test_a_question_without_a_rule_is_not_judged():
    found = compare(RuleJudge(), [Example("Q?", "R")], ["R"], ["x"], cache=Cache())
    assert (found.judged, found.unread) == (0, {"question without a rule": 2})


# --- by likelihood ---------------------------------------------------------------------------------------


def likelihood(engine: Engine | None = None, **options: Any) -> LikelihoodJudge:
    return LikelihoodJudge(engine or Engine(), Letters(**options), "weights")  # type: ignore[arg-type]


def test_likelihood_is_that_of_the_reference_after_the_answer():
    shown = Shown(Example("?", "XZ"), "XQ", "ZX")
    [(_, said)] = likelihood().rate({"k": shown})
    assert said.scores == Scores(
        (pytest.approx(-0.55),), (pytest.approx(-0.1),)
    )  # (0.1 + 1)/2, (0.1 + 0.1)/2


def test_the_answer_nearer_to_the_reference_wins_in_either_order():
    found = compare(likelihood(), [Example("?", "XZ")], ["XZ"], ["QQ"], cache=Cache())
    assert (found.win.count, found.order_disagreement.count) == (1, 0)
    assert found.difference.mean == pytest.approx(0.9)  # -0.1 - -1.0
    assert found.relative is None  # log-likelihoods have no zero


def test_neither_length_nor_fluency_of_an_answer_changes_its_likelihood():
    engine = Engine()
    list(likelihood(engine).rate({"k": Shown(Example("?", "XZ"), "X", "Q" * 40)}))
    [asked] = engine.asked
    assert {e.response for e in asked["judge"].examples} == {"XZ"}  # no answer's own tokens are measured


def test_the_questions_own_context_comes_before_the_evidence():
    engine = Engine()
    list(likelihood(engine).rate({"k": Shown(Example("?", "XZ", "Its context."), "A", "B")}))
    [asked] = engine.asked
    assert asked["judge"].examples[0].context == "Its context.\n\nAnswer: A"


def test_each_answer_is_scored_once_for_both_orders():
    engine = Engine()
    compare(likelihood(engine), [Example("?", "XZ")], ["XX"], ["ZZ"], cache=Cache())
    assert sum(len(r["judge"].examples) for r in engine.asked) == 2


def test_what_does_not_fit_is_not_judged():
    found = compare(
        likelihood(max_length=30), [Example("?", "XZ")] * 2, ["X", "X" * 50], ["Z", "Q"], cache=Cache()
    )
    assert (found.judged, found.unread) == (1, {"question, answer and reference longer than max_length": 2})


def test_a_question_without_a_reference_is_not_judged():
    found = compare(likelihood(), [Example("?", " ")], ["X"], ["Z"], cache=Cache())
    assert found.unread == {"question without a reference": 2}


def test_a_broken_model_judges_nothing():
    class Broken(Engine):
        def _one(self, request: Any) -> Any:
            return [Scored(float("nan"), 1) for _ in request.examples]

    found = compare(likelihood(Broken()), [Example("?", "X")], ["X"], ["Z"], cache=Cache())
    assert found.unread == {"likelihood that is not a finite number": 2}


def test_the_reference_alone_is_measured_whatever_training_learns():
    engine = Engine()
    asked = Example("?", "X", turns=(Turn("user", "Hi"), Turn("assistant", "Ho")))
    compare(likelihood(engine, loss_on="all"), [asked], ["X"], ["Z"], cache=Cache())
    [sent] = engine.asked
    assert {e.turns for e in sent["judge"].examples} == {asked.turns}


def test_a_judge_reads_the_turns_before_a_question_and_judges_each_conversation():
    turns = [(Turn("user", f"Say {n}."), Turn("assistant", n)) for n in "ab"]
    questions = [Example("Again.", "x", turns=t) for t in turns]
    engine, cache = Engine(), Cache()
    judge = PromptJudge(local(engine), TOTAL, "Q: {question} A: {first} B: {second}")
    compare(judge, questions, ["p", "p"], ["q", "q"], cache=cache)
    sent = ["".join(map(chr, p)) for requests in engine.asked for r in requests.values() for p in r.prompts]
    assert sum("User: Say a.\n\nAssistant: a\n\nUser: Again." in p for p in sent) == 2  # both orders
    assert len(set(sent)) == 4


def test_the_embedded_model_mostly_prefers_the_reference_to_another_questions_answer():
    from fedloom.data.template import Template
    from fedloom.engine.lora_engine import LoraEngine
    from fedloom.engine.models import load_base
    from fedloom.steps import LoraSpec

    model, tokenizer = load_base("embedded", device="cpu")
    template = Template(tokenizer, format="plain", max_length=256)
    engine = LoraEngine.build(model, template.encode, lora=LoraSpec(), tokens_per_pass=1024)
    questions = microworld.corpus(examples=64, seed=1)  # eight of each category, one category after the other
    right = [e.response for e in questions]
    others = [
        right[i - i % 8 + (i + 1) % 8] for i in range(64)
    ]  # the right answer to the next of its category
    found = compare(LikelihoodJudge(engine, template, "embedded"), questions, right, others, cache=Cache())
    assert found.judged == 64
    assert (
        found.win.ci95[0] > 0.5
    )  # more often than by chance; how often is no more than this tiny model can do


def test_the_rubrics_are_those_of_the_papers():
    assert (ASPECTS.aspects, ASPECTS.low, ASPECTS.high) == (
        ("helpfulness", "relevance", "correctness", "coherence"),
        1,
        5,
    )
    assert (TOTAL.low, TOTAL.high, len(TOTAL.aspects)) == (1, 10, 1)
    assert LIKELIHOOD.high == 0
    assert set(RUBRICS) == {"aspects", "total"}
