"""The microworld makes what it says, and its rules accept its own answers and no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fedloom.data.example import Example
from fedloom.data.held_out import hold_out
from fedloom.data.microworld import CATEGORIES, FAMILIES, KINDS, WORLD, Task, check, corpus, private_facts
from fedloom.errors import ConfigError
from fedloom.rng import numpy_stream


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return corpus(examples=640, seed=3)


def tasks(category: str, count: int = 200) -> list[Task]:
    rng = numpy_stream(7, "test", category)
    return [FAMILIES[category](rng) for _ in range(count)]


def asked(task: Task) -> Example:
    return Example(task.instruction, task.answers[0], task.context, task.category, rule=task.rule)


def test_categories_are_dollys_in_equal_parts(examples: list[Example]) -> None:
    assert Counter(e.category for e in examples) == dict.fromkeys(CATEGORIES, 80)


def test_what_does_not_divide_goes_to_the_first_categories() -> None:
    counts = Counter(e.category for e in corpus(examples=11))
    assert [counts[c] for c in CATEGORIES] == [2, 2, 2, 1, 1, 1, 1, 1]


def test_the_corpus_is_a_function_of_its_seed(examples: list[Example]) -> None:
    assert corpus(examples=640, seed=3) == examples
    assert corpus(examples=640, seed=4) != examples


def test_a_larger_corpus_begins_with_the_smaller_one() -> None:
    small, large = corpus(examples=80, seed=1), corpus(examples=160, seed=1)
    for category in CATEGORIES:
        of = [[(e.instruction, e.context) for e in c if e.category == category] for c in (small, large)]
        assert of[1][: len(of[0])] == of[0]


def test_no_instruction_occurs_twice(examples: list[Example]) -> None:
    assert (
        len({(e.instruction, e.context) for e in examples}) == len({e.id for e in examples}) == len(examples)
    )


def test_held_out_questions_are_never_trained_on(examples: list[Example]) -> None:
    train, test = hold_out(examples, per_category=10, seed=0, by="category")
    questions = [{(examples[i].instruction, examples[i].context) for i in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    assert len(test) == 80


@pytest.mark.parametrize("examples", [0, 7, 10**6])
def test_a_corpus_that_cannot_be_made_is_refused(examples: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.examples"):
        corpus(examples=examples)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rule_accepts_its_own_answer(category: str) -> None:
    assert all(check(asked(task), task.answers[0]) for task in tasks(category))


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rule_rejects_the_same_answer_in_another_style(category: str) -> None:
    for task in tasks(category):
        for style in task.answers[1:]:
            assert not check(asked(task), style), style


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rule_rejects_the_answers_of_other_categories(category: str) -> None:
    own = asked(tasks(category, 1)[0])
    for other in CATEGORIES:
        for task in tasks(other, 20):
            if other != category:
                assert not check(own, task.answers[0])


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rule_rejects_nothing_said_and_too_much(category: str) -> None:
    for task in tasks(category, 20):
        assert not check(asked(task), "")
        assert not check(asked(task), task.answers[0] + "\n" + task.answers[0])


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rule_forgives_white_space_at_the_ends_of_lines(category: str) -> None:
    for task in tasks(category, 20):
        assert check(asked(task), "\n " + task.answers[0].replace("\n", " \n") + "  \n")


BIRDS = Example("Name two birds, but not an owl.", "- heron\n- crow", rule="items:bird:2:owl")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("- heron\n- crow", True),
        ("- swan\n- duck", True),  # any two will do
        ("- heron", False),
        ("- heron\n- crow\n- swan", False),
        ("- heron\n- heron", False),
        ("- heron\n- owl", False),  # banned
        ("- heron\n- trout", False),  # a fish
        ("- heron\n- Crow", False),
        ("heron\n- crow", False),
        ("- heron, crow", False),
    ],
)
def test_a_list_is_checked_item_by_item(said: str, right: bool) -> None:
    assert check(BIRDS, said) is right


def test_without_a_ban_every_member_counts() -> None:
    assert check(replace(BIRDS, rule="items:bird:2:"), "- heron\n- owl")


STORY = Example(
    "Write a line about a fox and an owl.", "Once a fox met an owl at the mill.", rule="story:fox:owl"
)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Once an owl painted a fox at the tower.", True),
        ("Once a fox met an owl at the mill", False),
        ("A fox met an owl at the mill.", False),
        ("Once a fox met a crow at the mill.", False),
        ("Once a fox met an owlet.", False),
        ("Once " + "very " * 12 + "small fox owl.", False),  # too long
    ],
)
def test_a_story_must_name_both_and_stay_short(said: str, right: bool) -> None:
    assert check(STORY, said) is right


def test_an_unknown_rule_is_no_wrong_answer() -> None:
    with pytest.raises(ConfigError, match="expected a rule"):
        check(replace(STORY, rule="haiku"), "x")


def test_the_world_is_the_same_for_every_seed() -> None:
    facts = {
        e.instruction: e.response
        for e in (*corpus(examples=800, seed=1), *corpus(examples=800, seed=2))
        if e.category == "open_qa"
    }
    for s in (1, 2):
        assert all(
            facts[e.instruction] == e.response
            for e in corpus(examples=800, seed=s)
            if e.category == "open_qa"
        )
    assert all(thing in KINDS[fact.kind][1] for thing, fact in WORLD.items())


def test_private_facts_belong_to_one_owner() -> None:
    facts = {owner: private_facts(owner, 2) for owner in (f"client-{i:03d}" for i in range(20))}
    said = [e.response for own in facts.values() for e in own]
    assert len(set(said)) == len(said)
    assert all(
        e.private and e.owner == owner and check(e, e.response) for owner, own in facts.items() for e in own
    )


def test_private_facts_are_nowhere_in_the_corpus(examples: list[Example]) -> None:
    words = " ".join(f"{e.instruction} {e.context} {e.response}" for e in examples)
    for fact in private_facts("client-000", 5, seed=3):
        assert fact.response.removeprefix("The access code of ").split(" is ")[1] not in words
        assert "access code" not in words
    assert not any(e.private for e in examples)


def test_private_facts_are_a_function_of_owner_and_seed() -> None:
    assert private_facts("a", 3, seed=1) == private_facts("a", 3, seed=1)
    assert private_facts("a", 3, seed=1) != private_facts("a", 3, seed=2)
    assert private_facts("a", 3, seed=1) != private_facts("b", 3, seed=1)
