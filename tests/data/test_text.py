"""Words and ROUGE-L in many scripts: near-copies are alike, unrelated texts are not."""

from __future__ import annotations

import re
import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.text import folded, length, rouge_l, runs, words
from tests.data.many_scripts import TEXTS

each_script = pytest.mark.parametrize("script", TEXTS)


@each_script
def test_a_text_is_itself(script: str) -> None:
    text = TEXTS[script][0]
    assert rouge_l(text, text) == 1.0


@each_script
def test_a_near_copy_is_alike_and_another_text_is_not(script: str) -> None:
    text, near, other = TEXTS[script]
    assert 0.75 < rouge_l(text, near) < 1
    assert rouge_l(text, other) < 0.4


@each_script
def test_composed_and_decomposed_forms_are_one_text(script: str) -> None:
    text = TEXTS[script][0]
    composed, decomposed = (words(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    assert composed == decomposed == words(text)


@each_script
def test_combining_marks_stay_on_their_letters(script: str) -> None:
    marks = [c for c in folded(TEXTS[script][0]) if unicodedata.category(c) in ("Mn", "Mc")]
    assert marks == [
        c for word in words(TEXTS[script][0]) for c in word if unicodedata.category(c) in ("Mn", "Mc")
    ]


@given(st.text(st.characters(codec="ascii")))
def test_words_of_ascii_text_are_runs_of_letters_and_digits(text: str) -> None:
    assert words(text) == re.findall(r"[a-z0-9]+", text.lower())
    # The same with a letter that is none, which takes the path of all other scripts.
    assert words(text + " é")[:-1] == words(text)


@given(st.text())
def test_a_text_is_like_itself_whatever_its_characters(text: str) -> None:
    assert rouge_l(text, text) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ＡＢＣ １２３", "abc 123"),
        ("ﾊﾟｰﾃｨｰ", "パーティー"),  # half-width, with its mark apart
        ("STRASSE", "Straße"),
        ("ΟΔΟΣ", "οδός".replace("ό", "ο")),  # the sigma at a word's end
        ("می‌خواهم", "میخواهم"),  # a joiner nobody sees
        ("ca\u00adfé\u200b", "CAFE\u0301"),
        ("\ufefffirst", "first"),
        ("ﻣﺮﺣﺒﺎ", "مرحبا"),  # shapes of letters as old software writes them
        ("ﬁnd", "find"),
        ("a\u3000b", "a b"),
    ],
)
def test_how_a_letter_is_written_does_not_count(one: str, other: str) -> None:
    assert words(one) == words(other) != []
    assert folded(one) == folded(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("10²", "102"), ("½", "1 2"), ("👍", "👎"), ("!!!", "???"), ("+", "-"), ("🇫🇷", "🇯🇵"), ("é", "e")],
)
def test_what_means_something_else_is_something_else(one: str, other: str) -> None:
    assert rouge_l(one, other) < 0.5
    assert folded(one) != folded(other)


def test_texts_without_a_word_are_alike_only_if_they_are_the_same() -> None:
    assert rouge_l("?!", " ?! ") == 1.0
    assert rouge_l("?!", "...") == 0.0
    assert rouge_l("", "") == 1.0
    assert rouge_l("", "...") == 0.0


def test_scripts_are_mixed_in_one_text() -> None:
    assert words("用Python写2行代码") == ["用", "python", "写", "2", "行", "代", "码"]
    assert words("東京タワー333m") == ["東", "京", "タ", "ワ", "ー", "333m"]


def test_two_characters_of_a_script_without_blanks_are_as_long_as_a_word() -> None:
    assert length(words("如果发烧三天")) == 3.0
    assert length(words("if fever lasts 三天")) == 4.0


def test_runs_are_as_long_as_asked_in_words() -> None:
    assert list(runs(list("abcd"), 3)) == [("a", "b", "c"), ("b", "c", "d")]
    assert list(runs(list("ab"), 3)) == []
    assert list(runs(["一", "二", "a", "三", "四"], 2)) == [
        ("一", "二", "a"),
        ("二", "a", "三"),
        ("a", "三", "四"),
    ]


@given(st.lists(st.sampled_from(string.ascii_lowercase), max_size=12), st.integers(1, 5))
def test_runs_of_words_are_all_stretches_of_that_many(said: list[str], least: int) -> None:
    assert list(runs(said, least)) == [tuple(said[i : i + least]) for i in range(len(said) - least + 1)]
