"""Talking to a run's model, with a model that says what it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.experiment.chat import Chat, chat
from tests.fakes import experiment, state


class Bytes:
    """A template whose tokens are UTF-8 bytes."""

    stop = frozenset({0})

    def prompt_ids(self, instruction: str, context: str = "", *, room: int = 0) -> list[int]:
        return list(f"{instruction}|{context}".encode())

    def prompt_cut(self, instruction: str, context: str = "", *, room: int = 0) -> str:
        return "context" if context else "none"

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine is asked; it answers with the bytes of "né!"."""
    seen: list[Any] = []

    def stream(engine: Any, ids: list[int], adapter: Any, **how: Any) -> Iterator[int]:
        seen.append((bytes(ids).decode(), adapter, how["max_new_tokens"]))
        yield from "né!".encode()[: how["max_new_tokens"]]

    monkeypatch.setattr("fedloom.experiment.chat.stream", stream)
    return seen


@pytest.fixture
def model() -> Chat:
    machine: Any = SimpleNamespace(template=Bytes())
    engine: Any = SimpleNamespace(served=None)
    return Chat(Path("runs/mine"), experiment(), machine, engine, state(1.0))


def test_an_answer_comes_in_pieces_and_a_letter_of_several_tokens_comes_whole(
    model: Chat, asked: list[Any]
) -> None:
    assert [piece.text for piece in model.answer("Hi") if piece.text] == ["n", "é", "!"]


def test_the_last_piece_counts_every_token(model: Chat, asked: list[Any]) -> None:
    assert [*model.answer("Hi")][-1].tokens == 4  # n, two bytes of é, !
    assert [*model.answer("Hi", max_new_tokens=2)][-1].tokens == 2


def test_the_base_answers_without_the_adapter(model: Chat, asked: list[Any]) -> None:
    [*model.answer("Hi", "there")]
    [*model.answer("Hi", base=True)]
    assert [(prompt, adapter) for prompt, adapter, _ in asked] == [
        ("Hi|there", model.adapter),
        ("Hi|", None),
    ]


def test_it_says_whose_model_answers(model: Chat) -> None:
    assert model.whose().startswith("runs/mine: the adapter")
    assert model.whose(base=True).endswith("untuned")


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        chat(tmp_path)
