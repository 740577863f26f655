"""scripts/audit_acceptance.py: its canaries are what the law of exposure asks for, and it can fail.

The run itself takes minutes and is not here; docs/audit.md has its figures.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.experiment.machine import load_machine

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit_acceptance.py"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def made(script: SimpleNamespace, shared: Path) -> tuple[Any, Any, Any]:
    machine = load_machine(script.settings(shared / "models" / "stories260K", 1))
    return machine, *script.federation(machine)


def seen(**changes: Any) -> dict[str, Any]:
    row = {"exposure in": 10.5, "AUC": 0.99, **changes}
    return {"rows": {"released": row}, "epsilon": 1.6, "gate": {"passed": False}}


def test_every_client_holds_stories_and_canaries_of_its_own(made: tuple[Any, Any, Any]) -> None:
    _, data, on = made
    assert [len(own) for own in data.clients.values()] == [41] * 4  # 25 + 16
    assert len({e.response for own in data.clients.values() for e in own if e.private}) == 64
    assert [len(part) for part in (on.members, on.held_out, on.references)] == [64, 64, 2048]


def test_what_is_held_out_is_nowhere_trained_on(made: tuple[Any, Any, Any]) -> None:
    _, data, on = made
    trained = {e.response for own in data.clients.values() for e in own}
    assert trained.isdisjoint(e.response for e in (*on.twins, *on.references, *data.test))


def test_a_canary_is_24_tokens_whatever_was_drawn(made: tuple[Any, Any, Any]) -> None:
    machine, _, on = made
    assert {machine.template.encode(e).targets for e in (*on.members, *on.references)} == {25}  # and the end


def test_an_audit_that_sees_it_all_misses_nothing(script: SimpleNamespace) -> None:
    assert script.misses(seen()) == []


@pytest.mark.parametrize(("name", "value"), [("exposure in", 9.9), ("AUC", 0.9)])
def test_an_audit_that_sees_less_is_told(script: SimpleNamespace, name: str, value: float) -> None:
    [line] = script.misses(seen(**{name: value}))
    assert line.startswith(name)


def test_a_gate_that_lets_it_pass_is_told(script: SimpleNamespace) -> None:
    assert script.misses({**seen(), "gate": {"passed": True}}) == ["the gate let it pass"]
