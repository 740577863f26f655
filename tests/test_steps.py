"""drive: many clients' requests answered in one batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from threading import Barrier
from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Fit, LocalTraining, Privacy, Steps, Tokens, drive, drive_groups


class Echo:
    """Answers a request with ten times itself, and remembers who asked together."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.together: list[list[Hashable]] = []

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.together.append(list(requests))
        return {key: 10 * request for key, request in requests.items()}


def ask(*requests: int) -> Steps[list[int]]:
    answers = []
    for request in requests:
        answers.append((yield request))
    return answers


def test_everybody_gets_the_answers_to_its_own_requests() -> None:
    assert list(drive({"a": ask(1, 2), "b": ask(3, 4)}, Echo())) == [("a", [10, 20]), ("b", [30, 40])]


def test_requests_of_one_step_are_answered_together() -> None:
    engine = Echo()
    list(drive({"a": ask(1, 2, 3), "b": ask(4), "c": ask(5, 6)}, engine))
    assert engine.together == [["a", "b", "c"], ["a", "c"], ["a"]]


def test_who_is_done_first_is_handed_out_first() -> None:
    assert list(drive({"slow": ask(1, 2, 3), "quick": ask(4)}, Echo())) == [
        ("quick", [40]),
        ("slow", [10, 20, 30]),
    ]


def test_a_client_that_asks_nothing_needs_no_engine() -> None:
    engine = Echo()
    assert list(drive({"a": ask()}, engine)) == [("a", [])]
    assert engine.together == []


def test_nobody_to_drive_is_nothing_to_do() -> None:
    assert list(drive({}, Echo())) == []


def test_an_error_in_a_client_comes_through() -> None:
    def broken() -> Steps[int]:
        yield 1
        raise LookupError("of this client")

    with pytest.raises(LookupError, match="of this client"):
        list(drive({"a": ask(1, 2), "b": broken()}, Echo()))


def test_an_error_in_a_client_says_whose_it_is() -> None:
    def broken() -> Steps[int]:
        yield 1
        raise LookupError("of this client")

    with pytest.raises(LookupError) as raised:
        list(drive({"a": ask(1, 2), "hospital-b": broken()}, Echo()))
    assert raised.value.__notes__ == ["while hospital-b was at work"]


def test_an_error_of_the_engine_comes_through() -> None:
    class Broken:
        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            raise MemoryError("of the device")

    with pytest.raises(MemoryError, match="of the device"):
        list(drive({"a": ask(1)}, Broken()))


def test_an_answer_for_nobody_is_not_passed_over() -> None:
    class Forgetful:
        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            return {}

    with pytest.raises(KeyError):
        list(drive({"a": ask(1)}, Forgetful()))


def test_a_factor_that_lora_does_not_have_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match='"AB", "A" or "B", got \'C\''):
        Fit(AdapterState({}), [], LocalTraining(), train="C")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (float("nan"), 1.0), (1.0, -1.0), (1.0, float("inf"))])
def test_privacy_wants_a_positive_clip_and_a_noise_that_is_not_negative(wrong: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="Expected a"):
        Privacy(*wrong)


def test_targets_counts_the_labelled_tokens() -> None:
    assert Tokens((5, 6, 7), (False, True, True)).targets == 2


GROUPS = [{"a": (1, 2), "b": (3,)}, {"c": (4,)}, {"d": (5, 6), "e": (7,)}, {"f": (8,)}]


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_results_come_group_by_group_however_many_are_under_way(workers: int) -> None:
    engine = Echo(workers)
    groups = ({client: ask(*of) for client, of in group.items()} for group in GROUPS)
    found = list(drive_groups(groups, engine))
    assert [client for client, _ in found] == ["b", "a", "c", "e", "d", "f"]
    assert dict(found) == {c: [10 * x for x in xs] for group in GROUPS for c, xs in group.items()}
    assert sorted(engine.together) == [["a"], ["a", "b"], ["c"], ["d"], ["d", "e"], ["f"]]


def test_as_many_groups_are_under_way_as_there_are_workers() -> None:
    class Meeting(Echo):
        meet = Barrier(3, timeout=10)

        def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            self.meet.wait()  # raises unless three come together
            return super().answer(requests)

    assert len(list(drive_groups(({c: ask(1)} for c in "abcdef"), Meeting(3)))) == 6


def test_groups_are_not_begun_long_before_their_turn() -> None:
    begun: list[int] = []

    def groups() -> Iterator[dict[str, Steps[list[int]]]]:
        for number in range(100):
            begun.append(number)
            yield {str(number): ask(number)}

    results = drive_groups(groups(), Echo(2))
    next(results)
    assert len(begun) == 5  # two for each worker, and the first


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_one_group_ends_them_all(workers: int) -> None:
    def broken() -> Steps[list[int]]:
        yield 1
        raise LookupError("of this client")

    groups = [{"a": ask(1)}, {"b": broken()}, {"c": ask(1)}]
    results = drive_groups(groups, Echo(workers))
    assert next(results) == ("a", [10])
    with pytest.raises(LookupError, match="of this client"):
        next(results)
