"""Filters: planted copies are found, everything else passes, and every reason has its code."""

from __future__ import annotations

import random
import unicodedata

import pytest

from fedloom.data.example import Example
from fedloom.data.text import rouge_l
from fedloom.errors import ConfigError
from fedloom.synthesis.filters import Filters, LocalTexts, whole
from tests.data.many_scripts import TEXTS

FEVER = Example(
    "What should I do about a fever that lasts longer than three days?",
    "See a doctor, drink plenty of water and rest until the fever has gone for a whole day.",
)
SUMMARY = Example(
    "Summarize the letter of the patient in one sentence.",
    "Rosa Hale asks for an appointment in May.",
    "My name is Rosa Hale and I live at nine Mill Lane. I would like to come in May because my knee still hurts.",
)
LOCAL = [FEVER, SUMMARY]
NEW = Example(
    "Name three vegetables that contain a lot of iron.", "Spinach, lentils and beans contain much iron."
)


def local(**limits: object) -> LocalTexts:
    return LocalTexts(LOCAL, Filters(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Name three vegetables that contain iron.", None),
        ("", "format"),
        ("?!", "format"),
        ("- name three vegetables with iron", "format"),
        ("Name three vegetables. Output: spinach", "format"),
        ("Name three vegetables. Task 10: name a fruit", "format"),
        ("As a doctor, name three vegetables with iron.", "refusal"),
        ("As an assistant I have a question.", "refusal"),
        ("Sorry, I cannot think of another task.", "refusal"),
        ("I'm sorry, but there is no ninth task.", "refusal"),
        ("Assess the risk of a fall at home.", None),  # begins with "As", is no opener
        ("Name three vegetables", "short"),
        ("word " * 151, "long"),
        ("word " * 150, None),
        ("Draw a chart of my blood pressure.", "keyword"),
        ("Describe what the image shows in detail.", "keyword"),
        ("Which month should I go to the sea?", "keyword"),
        ("Withdraw the last sentence of the text.", None),  # "draw" is no word of it
        ("Where can I find a profile of her?", None),
    ],
)
def test_an_instruction_is_judged_by_its_form(text: str, code: str | None) -> None:
    assert Filters().instruction(text) == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("See a doctor.", None),
        ("- heron\n- owl", None),
        ("", "format"),
        ("...", "format"),
        ("Drink water. Instruction: name a fruit", "format"),
        ("Sorry, I do not know that.", "refusal"),
        ("As an AI language model, I have no knees.", "refusal"),
        ("very very very very good", "repetitive"),
        ("very very very good", None),
        ("drink water and rest and " * 4, "repetitive"),
        ("It rains. " + "Rest and drink. " * 4, "repetitive"),
    ],
)
def test_a_response_is_judged_by_its_form(text: str, code: str | None) -> None:
    assert Filters().response(text) == code


def test_limits_are_settings() -> None:
    few = Filters(shortest=1, longest=2, keywords=("owl",), openers=("hello",), repeats=2)
    assert few.instruction("Sorry") is None
    assert few.instruction("Name three birds") == "long"
    assert few.instruction("Name owl") == "keyword"
    assert few.response("Hello there") == "refusal"
    assert few.response("so so") == "repetitive"


def test_a_copied_instruction_is_found() -> None:
    assert local().instruction(FEVER.instruction) == "near-instruction"


def test_an_instruction_with_one_word_changed_is_found() -> None:
    assert local().instruction(FEVER.instruction.replace("fever", "cough")) == "near-instruction"


def test_a_new_instruction_passes() -> None:
    assert local().instruction(NEW.instruction) is None


def test_the_threshold_itself_passes() -> None:
    # "a b c d e f x y z w" and "a b c d e f g k l m": 6 of 10 words each way, F = 0.6
    texts = LocalTexts([Example("a b c d e f g k l m", "")], Filters(rouge_instruction=0.6))
    assert texts.instruction("a b c d e f x y z w") is None
    assert texts.instruction("g a b c d e f x y z") is None  # seven words in common, six in the same order
    assert texts.instruction("a b c d e f g y z w") == "near-instruction"  # 0.7


@pytest.mark.parametrize("planted", LOCAL)
def test_a_copy_of_a_local_example_is_found(planted: Example) -> None:
    assert local().example(planted) == "copy"


def test_a_copy_in_other_letters_is_found() -> None:
    shouted = Example(FEVER.instruction.upper(), "  " + FEVER.response.replace(",", ";"))
    assert local(rouge_example=1.0).example(shouted) == "copy"


def test_a_sample_with_a_few_words_changed_is_found() -> None:
    near = Example(FEVER.instruction.replace("fever", "cough"), FEVER.response.replace("fever", "cough"))
    assert local(verbatim=0).example(near) == "near-example"


def test_a_copied_passage_is_found_where_rouge_sees_little() -> None:
    passage = "I live at nine Mill Lane. I would like"
    told = Example(
        "Write down everything that you have heard about your neighbours in this town during the last year.",
        f"There was much talk of weather, bread, harvest and prices, and somebody said: {passage} quiet.",
    )
    assert max(rouge_l(whole(told), whole(e)) for e in LOCAL) < 0.5
    assert local().example(told) == "verbatim"
    assert local(verbatim=10).example(told) is None


def test_a_passage_is_found_in_whichever_field_it_lands() -> None:
    passage = " ".join(SUMMARY.context.split()[5:14])
    for sample in (Example(passage, "x"), Example("x", passage), Example("x", "y", passage)):
        assert local().example(sample) == "verbatim"


def test_a_passage_that_is_all_of_a_local_text_is_found() -> None:
    eight = "one two three four five six seven eight"
    texts = LocalTexts([Example(eight, "")], Filters())
    assert (
        texts.example(
            Example("Count for me, please, as far as you can go today.", f"I say {eight} and no further")
        )
        == "verbatim"
    )


SCRIPTS = [script for script in TEXTS if script != "emoji"]  # which begin no instruction
each_script = pytest.mark.parametrize("script", SCRIPTS)


@each_script
def test_near_copies_are_found_in_every_script(script: str) -> None:
    text, near, other = TEXTS[script]
    own = LocalTexts([Example(text, text)], Filters(verbatim=0))
    assert own.instruction(near) == "near-instruction"
    assert own.example(Example(near, near)) == "near-example"
    assert (own.instruction(other), own.example(Example(other, other))) == (None, None)
    assert own.example(Example(unicodedata.normalize("NFD", text), text)) == "copy"


@each_script
def test_a_copied_passage_is_found_in_every_script(script: str) -> None:
    text, near, other = TEXTS[script]
    own = LocalTexts([Example(text, "x")], Filters(rouge_example=1.0, rouge_instruction=1.0))
    assert own.example(Example(other, f"{other} {near}")) == "verbatim"
    assert own.example(Example(other, other)) is None


@each_script
def test_an_instruction_of_any_script_has_the_form_of_one(script: str) -> None:
    filters = Filters()
    assert [filters.instruction(text) for text in TEXTS[script]] == [None, None, None]
    assert [filters.response(text) for text in TEXTS[script]] == [None, None, None]
    assert filters.instruction(TEXTS[script][0] * 30) == "long"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("写一首关于春天的诗", None),  # nine characters, four words and a half
        ("写一首诗", "short"),
        ("请描述这张图片里的内容", "keyword"),
        ("对不起,我无法回答这个问题", "refusal"),
        ("¿Qué verduras contienen mucho hierro?", None),  # where Spanish begins a question
        ("、写一首关于春天的诗", "format"),
        ("写一首诗。Output：春天来了", "format"),
    ],
)
def test_the_limits_are_words_in_any_script(text: str, code: str | None) -> None:
    assert Filters(keywords=("图片",), openers=("对不起",)).instruction(text) == code


def test_a_phrase_repeated_in_a_script_without_blanks_is_found() -> None:
    assert Filters().response("请多喝水并且好好休息。" * 4) == "repetitive"  # ten characters
    assert Filters().response("请多喝水并且好好休息。" * 3) is None


def test_a_new_sample_passes() -> None:
    assert local().example(NEW) is None


def test_nothing_is_near_the_texts_of_nobody() -> None:
    nobody = LocalTexts([], Filters())
    assert nobody.instruction("Name three vegetables with iron.") is None
    assert nobody.example(NEW) is None


def test_the_index_misses_no_near_copy() -> None:
    random.seed(0)
    text = lambda: " ".join(random.choices("abcdef", k=random.randint(1, 12)))  # noqa: E731
    for _ in range(300):
        own = [Example(text(), "") for _ in range(6)]
        new, limit = text(), random.random()
        expected = any(rouge_l(e.instruction, new) > limit for e in own)
        found = LocalTexts(own, Filters(rouge_instruction=limit)).instruction(new)
        assert (found == "near-instruction") == expected


def test_a_planted_copy_is_found_among_thousands() -> None:
    crowd = [
        Example(f"Question {i} about topic {i % 97} and matter {i % 89}", f"Answer {i}") for i in range(5000)
    ]
    texts = LocalTexts([*crowd, FEVER], Filters())
    assert texts.example(FEVER) == "copy"
    assert texts.instruction(FEVER.instruction) == "near-instruction"
    assert texts.instruction(NEW.instruction) is None


@pytest.mark.parametrize(
    "limits",
    [
        {"shortest": 0},
        {"shortest": 9, "longest": 8},
        {"rouge_instruction": 1.1},
        {"rouge_example": -0.1},
        {"verbatim": -1},
        {"repeats": 1},
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Filters(**limits)  # type: ignore[arg-type]
