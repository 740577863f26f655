"""How answers are asked for and graded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.data.text import rouge_l
from fedloom.evaluation.answers import Answer, answers_of, grade
from fedloom.evaluation.cache import Cache
from fedloom.steps import Generate
from tests.data.many_scripts import TEXTS
from tests.fakes import state


@pytest.mark.parametrize(
    ("reference", "said", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("the cat sat on the mat", "the cat on mat", 0.8),  # 4 in common: 2 * 4 / (6 + 4)
        ("the cat sat", "sat cat the", 1 / 3),  # 1 in common, order counts: 2 * 1 / (3 + 3)
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004: 3 of 4 and 3 of 4
        ("police killed the gunman", "the gunman kill police", 0.5),  # Lin 2004: 2 of 4 and 2 of 4
        ("The Cat!", "the, cat", 1.0),  # neither case nor punctuation counts
        ("in 1984", "In 1984.", 1.0),
        ("über Ärzte", "ÜBER ärzte", 1.0),
        ("a b c d", "e f", 0.0),
        ("", "", 1.0),
        ("word", "", 0.0),
        ("", "word", 0.0),
    ],
)
def test_rouge_l_of_known_pairs(reference: str, said: str, expected: float) -> None:
    assert rouge_l(reference, said) == pytest.approx(expected, rel=1e-12)


def ended(*texts: str) -> list[Answer]:
    return [Answer(text, ended=True) for text in texts]


def example(response: str, rule: str = "") -> Example:
    return Example("Do it.", response, rule=rule)


def test_exact_folds_case_and_white_space_and_nothing_else() -> None:
    test = [example("The  fox.")] * 4
    assert grade(test, ended("the fox.", "The\nFOX. ", "the fox", "a fox."))["exact"] == 0.5


def test_exact_folds_how_unicode_writes_a_letter() -> None:
    test = [example("Größe １２")] * 3
    assert grade(test, ended("GRÖSSE 12", "gro\u0308ße 12", "Grosse 12"))["exact"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("script", TEXTS)
def test_answers_are_graded_in_every_script(script: str) -> None:
    text, near, other = TEXTS[script]
    assert grade([example(text)], ended(text)) == {"exact": 1.0, "rouge_l": 1.0, "ended": 1.0}
    assert grade([example(text)], ended(near))["rouge_l"] > 0.75
    assert grade([example(text)], ended(other))["rouge_l"] < 0.4


def test_metrics_are_means_over_the_examples() -> None:
    found = grade([example("a b"), example("c d")], ended("a b", "c"))
    assert found["exact"] == 0.5
    assert found["rouge_l"] == pytest.approx((1 + 2 / 3) / 2)  # 2 * 1 / (2 + 1)


def test_the_rule_is_asked_only_where_every_example_has_one() -> None:
    assert list(grade([example("It is May.", "exact")], ended("it is may."))) == [
        "rule",
        "exact",
        "rouge_l",
        "ended",
    ]
    assert "rule" not in grade([example("It is May.", "exact"), example("x")], ended("", ""))


def test_the_rule_is_stricter_than_exact() -> None:
    found = grade([example("It is May.", "exact")], ended("it is may."))
    assert (found["rule"], found["exact"]) == (0.0, 1.0)


def test_an_answer_too_few_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="shorter"):
        grade([example("a"), example("b")], ended("a"))


class Words:
    """A template of one token a letter, and an engine that repeats the prompt."""

    stop = frozenset({0})
    workers = 1

    def prompt_ids(self, example: Example, *, room: int) -> list[int]:
        return [ord(c) for c in f"{example.instruction}{example.context}"][:room]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked = requests
        return {row: [list(p) for p in request.prompts] for row, request in requests.items()}


def ask(
    engine: Any, questions: list[Example], adapters: dict[str, Any], *, cache: Cache, weights: str = "w"
) -> dict[str, list[Answer]]:
    return answers_of(engine, engine, questions, adapters, weights=weights, max_new_tokens=8, cache=cache)


def test_every_row_is_asked_the_same_questions_in_one_call() -> None:
    words, adapter = Words(), state(1.0)
    test = [Example("ab", "x"), Example("cd", "y", context="e")]
    said = ask(words, test, {"base": None, "tuned": adapter}, cache=Cache())
    assert said == {"base": ended("ab", "cde"), "tuned": ended("ab", "cde")}
    base, tuned = words.asked["base"], words.asked["tuned"]
    assert isinstance(base, Generate)
    assert (base.adapter, tuned.adapter) == (None, adapter)
    assert base.prompts == tuned.prompts
    assert (base.max_new_tokens, base.stop, base.temperature) == (8, frozenset({0}), 0.0)


def test_a_cut_answer_is_neither_right_nor_exact() -> None:
    found = grade(
        [example("It is May.", "exact")] * 2,
        [Answer("It is May.", ended=False), Answer("It is May.", ended=True)],
    )
    assert (found["rule"], found["exact"], found["ended"], found["rouge_l"]) == (0.5, 0.5, 0.5, 1.0)


def test_an_answer_as_long_as_the_limit_is_cut() -> None:
    said = ask(Words(), [Example("abcdefgh", ""), Example("abcdefg", "")], {"base": None}, cache=Cache())
    assert said["base"] == [Answer("abcdefgh", ended=False), Answer("abcdefg", ended=True)]


def test_answers_are_kept_and_never_generated_twice(tmp_path: Path) -> None:
    first, again = Words(), Words()
    a, b, c = (Example(letter, "") for letter in "abc")
    ask(first, [a, b], {"base": None}, cache=Cache(tmp_path / "answers.jsonl"))
    assert ask(again, [b, c], {"base": None}, cache=Cache(tmp_path / "answers.jsonl")) == {
        "base": ended("b", "c")
    }
    assert again.asked["base"].prompts == [[ord("c")]]


def test_answers_of_other_weights_or_of_an_older_version_are_asked_for_again(tmp_path: Path) -> None:
    cache, words = Cache(), Words()
    ask(words, [Example("a", "")], {"base": None}, cache=cache)
    ask(words, [Example("a", "")], {"base": None}, cache=cache, weights="v")
    assert words.asked["base"].prompts == [[ord("a")]]
    old = Cache()
    old.put_all({key: {"answer": "b"} for key in cache._kept})  # 0.1.0 did not say whether an answer ended
    assert ask(words, [Example("a", "")], {"base": None}, cache=old) == {"base": ended("a")}
