"""Rows are asked in units that the workers share, and that nothing but the questions decides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from threading import Barrier
from typing import Any

import pytest

from fedloom.evaluation.units import ask

ROWS = {"base": [1, 2, 3], "tuned": [1, 2, 3, 4], "none": [], "other": [5]}


class Twice:
    """Answers a list of numbers with their doubles, and remembers what was asked together."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.units: list[dict[Hashable, Any]] = []

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.units.append(dict(requests))
        return {row: [2 * number for number in numbers] for row, numbers in requests.items()}


def asked(engine: Twice, unit: int) -> list[Any]:
    return list(ask(engine, ROWS, lambda row, part: part, unit=unit))


@pytest.mark.parametrize("unit", [1, 3, 8, 100])
def test_every_item_of_every_row_is_answered_once_and_in_order(unit: int) -> None:
    found: dict[str, list[int]] = {row: [] for row in ROWS}
    for row, part, answers in asked(Twice(), unit):
        assert answers == [2 * number for number in part]
        found[row] += part
    assert found == ROWS


def test_units_are_of_nearly_the_same_size() -> None:
    engine = Twice()
    asked(engine, 5)  # eight items: four and four, not five and three
    assert engine.units == [{"base": [1, 2, 3], "tuned": [1]}, {"tuned": [2, 3, 4], "other": [5]}]


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_the_number_of_workers_decides_neither_units_nor_answers(workers: int) -> None:
    alone, many = Twice(), Twice(workers)
    assert asked(many, 3) == asked(alone, 3)
    assert sorted(map(repr, many.units)) == sorted(map(repr, alone.units))


def test_as_many_units_are_answered_at_a_time_as_there_are_workers() -> None:
    class Meeting(Twice):
        meet = Barrier(2, timeout=10)

        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            self.meet.wait()  # raises unless two come together
            return super().answer(requests)

    engine = Meeting(2)
    asked(engine, 2)
    assert len(engine.units) == 4


def test_nothing_is_asked_where_there_is_nothing_to_ask() -> None:
    engine = Twice()
    assert list(ask(engine, {"base": []}, lambda row, part: part, unit=4)) == []
    assert engine.units == []
