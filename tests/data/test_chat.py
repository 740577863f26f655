from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.data import sources
from fedloom.data.example import Example, Turn
from fedloom.data.held_out import hold_out
from fedloom.data.records import Reading
from fedloom.errors import ConfigError, DataError
from fedloom.experiment.build import tools
from fedloom.experiment.toml import load
from tests.fakes import dataset as toy
from tests.fakes import machine

FIELD = Path(__file__).parents[2].parent / "shared" / "field"


def turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def said(who: str, value: object) -> dict[str, object]:
    return {"from": who, "value": value}


ASKED, ANSWERED = turn("user", "What is red?"), turn("assistant", "A fox.")


def read(tmp_path: Path, *records: object, **options: object) -> list[Example]:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return list(sources.chat(file, Reading(**options)))  # type: ignore[arg-type]


def test_a_conversation_is_one_example_of_its_last_answer(tmp_path: Path) -> None:
    [openai] = read(
        tmp_path,
        {
            "messages": [
                turn("system", "Be brief."),
                ASKED,
                ANSWERED,
                turn("user", "Sure?"),
                turn("assistant", "Yes."),
            ]
        },
    )
    earlier = (Turn("system", "Be brief."), Turn("user", "What is red?"), Turn("assistant", "A fox."))
    assert openai == Example("Sure?", "Yes.", id="chats.jsonl:1", turns=earlier)
    [sharegpt] = read(
        tmp_path,
        {
            "conversations": [
                said("system", "Be brief."),
                said("human", "What is red?"),
                said("gpt", "A fox."),
                said("human", "Sure?"),
                said("gpt", "Yes."),
            ]
        },
    )
    assert sharegpt == openai


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [turn("developer", "Be brief."), ASKED, ANSWERED]},
        {"system": "Be brief.", "messages": [ASKED, ANSWERED]},
        {"system": "Be brief.", "conversations": [said("user", "What is red?"), said("model", "A fox.")]},
        {"conversations": [turn("system", "Be brief."), ASKED, ANSWERED], "tools": "[]"},
        {
            "messages": [
                turn("system", [{"type": "text", "text": "Be brief."}]),
                ASKED,
                {**ANSWERED, "tool_calls": None, "name": "x"},
            ]
        },
    ],
)
def test_the_common_spellings_mean_the_same(tmp_path: Path, record: object) -> None:
    assert read(tmp_path, record) == [
        Example("What is red?", "A fox.", id="chats.jsonl:1", turns=(Turn("system", "Be brief."),))
    ]


def test_text_parts_are_joined_by_line_ends(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "red?"}]
    assert read(tmp_path, {"messages": [turn("user", parts), ANSWERED]})[0].instruction == "What is\nred?"


def test_category_and_owner_are_kept(tmp_path: Path) -> None:
    [e] = read(tmp_path, {"messages": [ASKED, ANSWERED], "category": "animals", "owner": 7})
    assert (e.category, e.owner) == ("animals", "7")


SECRET = "SECRETWORD"
BAD = {
    "no list": ("missing", {"text": SECRET}),
    "both": ("type", {"messages": [ASKED, ANSWERED], "conversations": [ASKED, ANSWERED]}),
    "null list": ("null", {"messages": None}),
    "text list": ("type", {"messages": json.dumps([ASKED, ANSWERED])}),
    "no turns": ("empty", {"messages": []}),
    "no object": ("type", {"messages": [SECRET, ANSWERED]}),
    "no role": ("missing", {"messages": [{"content": SECRET}, ANSWERED]}),
    "role and from": ("missing", {"messages": [{**ASKED, "from": "human"}, ANSWERED]}),
    "role of another kind": ("type", {"messages": [turn(["user"], SECRET), ANSWERED]}),  # type: ignore[arg-type]
    "unknown role": ("role", {"messages": [turn(SECRET, "x"), ANSWERED]}),
    "no content": ("missing", {"messages": [{"role": "user"}, ANSWERED]}),
    "null content": ("null", {"messages": [turn("user", None), ANSWERED]}),
    "number": ("type", {"messages": [turn("user", 3), ANSWERED]}),
    "blank": ("empty", {"messages": [ASKED, turn("assistant", " \n")]}),
    "blank parts": ("empty", {"messages": [turn("user", []), ANSWERED]}),
    "image": (
        "part",
        {
            "messages": [
                turn("user", [{"type": "text", "text": SECRET}, {"type": "image_url", "image_url": {}}]),
                ANSWERED,
            ]
        },
    ),
    "part without text": ("type", {"messages": [turn("user", [{"type": "text"}]), ANSWERED]}),
    "tool": ("tool", {"messages": [ASKED, ANSWERED, turn("tool", SECRET), ANSWERED]}),
    "observation": (
        "tool",
        {"conversations": [said("human", "x"), said("function_call", SECRET), said("gpt", "y")]},
    ),
    "tool call": ("tool", {"messages": [ASKED, turn("assistant", None, tool_calls=[{"id": SECRET}])]}),
    "tools": ("tool", {"messages": [ASKED, ANSWERED], "tools": [{"name": SECRET}]}),
    "ends with a question": ("order", {"messages": [ASKED, ANSWERED, turn("user", SECRET)]}),
    "system alone": ("order", {"messages": [turn("system", SECRET)]}),
    "two questions": ("order", {"messages": [ASKED, ASKED, ANSWERED]}),
    "answer first": ("order", {"messages": [ANSWERED, ASKED, ANSWERED]}),
    "late system": ("order", {"messages": [ASKED, ANSWERED, turn("system", SECRET), ASKED, ANSWERED]}),
    "two systems": ("order", {"system": SECRET, "messages": [turn("system", "x"), ASKED, ANSWERED]}),
    "system of another kind": ("type", {"system": [SECRET], "messages": [ASKED, ANSWERED]}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_refused_by_line_and_reason_and_never_quoted(tmp_path: Path, case: str) -> None:
    code, record = BAD[case]
    good = {"messages": [ASKED, ANSWERED]}
    with pytest.raises(DataError, match=rf"chats\.jsonl:2  {code}: ") as refused:
        read(tmp_path, good, record)
    assert SECRET not in str(refused.value)
    quarantine = tmp_path / "quarantine.jsonl"
    assert len(read(tmp_path, good, record, on_bad="skip", quarantine=quarantine)) == 1
    assert json.loads(json.loads(quarantine.read_text())["raw"]) == record


def test_the_same_last_question_after_other_turns_is_another_question(tmp_path: Path) -> None:
    again = turn("user", "Say it again.")
    chats = [
        {"messages": [turn("user", f"Say {n}."), turn("assistant", f"{n}"), again, turn("assistant", f"{n}")]}
        for n in range(6)
    ]
    examples = read(tmp_path, *chats)
    assert len(set(examples)) == 6
    assert len(hold_out(examples, per_category=2)[1]) == 2


@pytest.mark.parametrize("name", ["01_openai_messages.jsonl", "02_sharegpt_multiturn.jsonl"])
def test_the_fields_files_are_read(name: str) -> None:
    if not FIELD.exists():
        pytest.skip("the field's files are not here")
    examples, told = sources.load("chat", str(FIELD / name))
    assert len(examples) == told["records"] > 0
    assert all(e.turns and e.response for e in examples)


def test_what_was_said_before_is_part_of_what_the_data_are() -> None:
    def data(*turns: Turn) -> str:
        e = Example("a", "b", category="low", turns=turns)
        return replace(toy({"c": (1.0,)}), clients={"c": [e]}).sha256()

    one, two = Turn("user", "x"), Turn("assistant", "y")
    assert len({data(), data(one, two), data(one, Turn("assistant", "z")), data(Turn("system", "x"))}) == 4
    assert data(one, two) == data(one, two)


def test_generating_examples_from_conversations_is_refused() -> None:
    settings = load("fedpit-microworld")
    e = Example("a", "b", category="low", turns=(Turn("user", "x"), Turn("assistant", "y")))
    with pytest.raises(ConfigError, match="these data are conversations"):
        tools(
            settings.algorithm, settings, replace(toy({"c": (1.0,)}), clients={"c": [e]}), machine().template
        )


def test_turns_in_another_order_make_no_example() -> None:
    with pytest.raises(DataError, match="an optional system turn"):
        Example("a", "b", turns=(Turn("assistant", "c"),))


def test_an_example_comes_back_from_json() -> None:
    e = Example("a", "b", turns=(Turn("user", "c"), Turn("assistant", "d")))
    turns = [{"role": t.role, "text": t.text} for t in e.turns]
    assert Example("a", "b", turns=turns) == e  # type: ignore[arg-type]
    assert e.texts == ("c", "d", "a", "", "b")
    assert e.question == "User: c\n\nAssistant: d\n\nUser: a"
