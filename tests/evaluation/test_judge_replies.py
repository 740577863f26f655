"""A judge's reply is read exactly or counted as malformed."""

from __future__ import annotations

import json

import pytest

from fedloom.evaluation.backends import RUBRICS, shipped_prompt
from fedloom.evaluation.verdicts import Scores, read_aspects, read_total

NAMES = ("helpfulness", "relevance", "correctness", "coherence")


def aspects(first=(5, 4, 3, 2), second=(1, 1, 1, 1), **more) -> str:
    said = {"first": dict(zip(NAMES, first, strict=True)), "second": dict(zip(NAMES, second, strict=True))}
    return json.dumps(said | more)


READ = Scores((5, 4, 3, 2), (1, 1, 1, 1))


@pytest.mark.parametrize(
    "reply",
    [
        aspects(),
        f"\n  {aspects()}\n",
        f"```json\n{aspects()}\n```",
        f"```\n{aspects()}```",
        f"<think>First I gave {{5, 5}}.</think>\n{aspects()}",
    ],
)
def test_four_aspects_are_read_from_json_alone_or_fenced_or_after_a_thought(reply):
    assert read_aspects(reply) == READ


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The first one is better.",
        f"Here you are: {aspects()}",
        f"{aspects()}\n{aspects()}",
        f"{aspects()} or rather {aspects((1, 1, 1, 1), (5, 5, 5, 5))}",
        aspects(first=(6, 4, 3, 2)),
        aspects(first=(0, 4, 3, 2)),
        aspects(first=(-1, 4, 3, 2)),
        aspects(first=("5", 4, 3, 2)),
        aspects(first=(True, 4, 3, 2)),
        aspects(first=(None, 4, 3, 2)),
        aspects(first=(float("nan"), 4, 3, 2)),
        aspects(first=(float("inf"), 4, 3, 2)),
        aspects().replace("5", "5e0"),
        aspects().replace("5", "0.5e1"),
        aspects().replace("5", "05"),
        aspects().replace("5", "+5"),
        aspects().replace("5", "-0"),
        aspects().replace("5", "５"),
        aspects().replace("5", "٥"),
        aspects().replace("5", "5" * 5000),
        aspects().replace('"coherence": 2', '"coherence": 2, "coherenc\\u0065": 3'),
        aspects() + "\u00a0 5",
        aspects(third={}),
        aspects()[:-10],
        aspects().replace('"coherence": 2', '"coherenc": 2'),
        aspects().replace('"coherence": 2', '"coherence": 2, "style": 5'),
        aspects().replace('"coherence": 2', '"coherence": 2, "coherence": 3'),
        json.dumps([5, 4]),
        '{"first": 5, "second": 4}',
        "[" * 100_000,
        f"<think>no end {aspects()}",
    ],
)
def test_anything_else_has_no_aspects(reply):
    assert read_aspects(reply) is None


@pytest.mark.parametrize(
    "reply",
    [
        "8 7",
        "8, 7",
        " 8   7 \nBecause.",
        "8 7\r\nBecause.",
        "8.000 7\t",
        "\n\n8 7\n",
        "8.0 7.0",
        "<think>9 1</think>8 7\nSo.",
    ],
)
def test_two_numbers_on_the_first_line_are_the_total_scores(reply):
    assert read_total(reply) == Scores((8,), (7,))


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "8",
        "8 7 6",
        "87",
        "Scores: 8 7",
        "8/10 7/10",
        "11 7",
        "0 7",
        "-8 7",
        "8 vs 7",
        "eight seven",
        "Because.\n8 7",
        "8 7.",
        "010 7",
        "08 07",
        "8 07",
        "8. 7",
        ".8 7",
        "8e0 7",
        "+8 7",
        "８ ７",
        "८ ७",
        "8\u30007",
        "8\u00a07",
        "8\n7",
        "8\u20287",
        "1" * 5000 + " 7",
    ],
)
def test_anything_else_has_no_total(reply):
    assert read_total(reply) is None


@pytest.mark.parametrize("name", ["aspects", "total"])
def test_our_own_prompts_show_the_question_and_both_answers_once(name):
    text = shipped_prompt(RUBRICS[name])
    assert [text.count(f"{{{slot}}}") for slot in ("question", "first", "second")] == [1, 1, 1]


def test_the_worked_example_in_our_prompt_is_what_we_read():
    [line] = [line for line in shipped_prompt(RUBRICS["aspects"]).splitlines() if line.startswith('{"first"')]
    assert read_aspects(line) == Scores((5, 5, 5, 5), (1, 3, 2, 2))
