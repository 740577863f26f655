"""Files of questions in the shapes they are published in, and the answers that are stored in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.errors import DataError
from fedloom.evaluation.questions import answers, columns, load, without

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")


def write(folder: Path, *rows: Any, name: str = "questions.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@needs_data
@pytest.mark.parametrize(
    ("path", "count", "first"),
    [
        ("vicuna/question.jsonl", 80, ("How can I improve my time management skills?", "", "generic")),
        ("self_instruct/seed_tasks.jsonl", 175, None),
        ("self_instruct/user_oriented_instructions.jsonl", 252, None),
    ],
)
def test_published_questions_are_read_as_they_are(
    path: str, count: int, first: tuple[str, str, str] | None
) -> None:
    found = load(SHARED / path)
    assert len(found) == count
    assert all(q.asked.instruction.strip() for q in found)
    if first is not None:
        assert (found[0].asked.instruction, found[0].asked.response, found[0].asked.category) == first


@needs_data
def test_of_several_turns_the_first_is_asked() -> None:
    question = load(SHARED / "mt_bench" / "question.jsonl")[0].asked
    assert question.instruction.startswith("Compose an engaging travel blog post")
    assert "Rewrite your previous response" not in question.instruction
    assert (question.id, question.category) == ("81", "writing")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "Do it.", "context": "On this.", "response": "Done."},
            ("Do it.", "On this.", "Done."),
        ),
        ({"instruction": "Do it.", "input": "On this.", "output": "Done."}, ("Do it.", "On this.", "Done.")),
        ({"question": "Why?", "answer": "So."}, ("Why?", "", "So.")),
        ({"prompt": "Go on."}, ("Go on.", "", "")),
        ({"text": "Say.", "category": "math"}, ("Say.", "", "")),
        ({"turns": ["One?", "Two?"], "reference": ["1", "2"]}, ("One?", "", "1")),
        (
            {
                "instruction": "Do it.",
                "instances": [{"input": "A", "output": "B"}, {"input": "C", "output": "D"}],
            },
            ("Do it.", "A", "B"),
        ),
    ],
)
def test_every_shape_of_a_question(
    tmp_path: Path, record: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    found, _ = load(write(tmp_path, record, {"question": "Another?"}))
    assert (found.asked.instruction, found.asked.context, found.asked.response) == expected


def test_a_record_without_a_question_is_named_with_its_fields_and_not_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "Why?"}, {"body": "Secret.", "title": "T"})
    with pytest.raises(
        DataError, match=r"questions.jsonl:2  missing: no question under .*; its fields are body, title"
    ) as refused:
        load(path)
    assert "Secret" not in str(refused.value)


def test_a_question_that_a_client_holds_is_left_out(tmp_path: Path) -> None:
    questions = load(
        write(
            tmp_path,
            {"instruction": "What IS it?"},
            {"instruction": "Who?"},
            {"instruction": "Who?", "input": "Me."},
        )
    )
    held = [Example("what is  it?", "That."), Example("Who?", "You.", "Me.")]
    assert [q.asked.instruction for q in without(questions, held)] == ["Who?"]


MEDICAL = {
    "instruction": "Treat it.",
    "input": "A cold.",
    "difficulty": 2,
    "gpt-4": "Rest.",
    "claude-2": "Tea.",
    "topic": "Colds",
}


def test_stored_answers_are_every_column_of_text_that_is_neither_question_nor_label(tmp_path: Path) -> None:
    path = write(tmp_path, MEDICAL, {**MEDICAL, "instruction": "Cure it.", "note": "only here"})
    assert columns(path, load(path)) == ["gpt-4", "claude-2"]


def test_a_file_without_answers_says_which_fields_it_has(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "Why?", "category": "x"})
    with pytest.raises(DataError, match=r"none of its fields \(instruction, category\) is an answer"):
        columns(path, load(path))


ASKED = [Example("What?", "", id="f:1"), Example("Why?", "", "Because of this.", id="f:2")]


def test_stored_answers_are_found_by_instruction_and_context(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"instruction": "Why?", "context": "Because  of this.", "answer": "So."},
        {"instruction": "Why?", "context": "Another.", "answer": "No."},
        {"instruction": "What?", "answer": ""},
    )
    assert answers(path, ASKED, "answer") == ["", "So."]


def test_stored_answers_may_have_another_name(tmp_path: Path) -> None:
    assert answers(write(tmp_path, {"instruction": "What?", "output": "That."}), ASKED[:1], "output") == [
        "That."
    ]


def test_a_name_that_no_record_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 of 1 records have no text under 'gpt-5'; they have instruction, input, gpt-4"
    ):
        answers(write(tmp_path, MEDICAL), [Example("Treat it.", "", "A cold.")], "gpt-5")


def test_a_question_without_a_stored_answer_is_named_by_its_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 questions, first f:2") as refused:
        answers(write(tmp_path, {"instruction": "What?", "answer": "That."}), ASKED, "answer")
    assert "Why?" not in str(refused.value)


def test_two_answers_to_one_question_are_refused_without_quoting_them(tmp_path: Path) -> None:
    path = write(tmp_path, *({"instruction": "What?", "answer": a} for a in ("Sun.", "Moon.")))
    with pytest.raises(DataError, match="two different answers") as refused:
        answers(path, ASKED[:1], "answer")
    assert "Sun." not in str(refused.value)


def test_a_damaged_file_of_answers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "What?", "answer": "That."})
    path.write_text(path.read_text() + '{"instruction": "Why', "utf-8")
    with pytest.raises(DataError):
        answers(path, ASKED[:1], "answer")
