"""The same pool over Ray; a cluster of one machine is started for these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fedloom.engine import loading
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.pool import Pool
from fedloom.engine.ray_pool import RayWorkers
from fedloom.errors import ConfigError
from fedloom.steps import Fit
from tests.engine.test_pool import LOCAL, SETUP, answered, example

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(RayWorkers(SETUP, threads=1, address="local"), 2, encode=lambda example: example) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone() -> LoraEngine:
    return loading.load(SETUP, lambda example: example)[0]


def test_two_actors_answer_like_one_engine(pool: Pool, alone: LoraEngine) -> None:
    start = alone.layout.initial(0)
    assert answered(pool, start, threads=2) == answered(alone, start)


def test_a_killed_actor_is_replaced(pool: Pool, alone: LoraEngine) -> None:
    start = alone.layout.initial(0)
    for _, actor in pool._free:
        ray.kill(actor._handle)  # type: ignore[attr-defined]
    assert answered(pool, start, threads=2) == answered(alone, start)


def test_a_refused_request_comes_back_as_the_error_it_is(pool: Pool, alone: LoraEngine) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        pool.answer({0: Fit(alone.layout.initial(0), [example(0)], LOCAL, seen=-1)})
