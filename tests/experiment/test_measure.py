"""Rows are measured on the same examples, and a model that diverged is named."""

from __future__ import annotations

import pytest

from fedloom.errors import RunError
from fedloom.evaluation.cache import Cache
from fedloom.experiment.measure import measure
from tests.fakes import FOUR, ToyEngine, dataset, experiment, machine, state


def test_rows_are_measured_on_the_same_examples() -> None:
    found = measure(
        experiment(), dataset(FOUR), machine(), {"base": None, "federated": state(2.0, 2.0)}, cache=Cache()
    )
    # Held out are 1 and 2 of "low" and 10 of "high"; the base is at 0.
    assert found["rows"]["base"]["metrics"]["loss"] == pytest.approx((0.5 + 2 + 50) / 3)
    assert found["rows"]["federated"]["metrics"]["loss"] == pytest.approx((0.5 + 0 + 32) / 3)
    assert found["rows"]["federated"]["groups"] == {"high": {"loss": 32.0}, "low": {"loss": 0.25}}


def test_a_model_that_diverged_is_named_with_advice() -> None:
    with pytest.raises(
        RunError, match=r"held-out loss of 'federated' is no finite number.*local\.learning_rate"
    ):
        measure(
            experiment(),
            dataset(FOUR),
            machine(ToyEngine()),
            {"base": None, "federated": state(float("nan"))},
            cache=Cache(),
        )


def test_measuring_keeps_every_client_s_mix_and_how_many_were_asked() -> None:
    found = measure(experiment(), dataset(FOUR), machine(), {"base": None}, cache=Cache())
    assert found["mix"]["b"] == {"high": 1, "low": 1}
    assert found["answered"] == {}  # no answers wanted
