"""An engine of several worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.engine import loading
from fedloom.engine.fork_server import ForkServer
from fedloom.engine.loading import Setup
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.pool import Pool, Ranked, WorkerLost
from fedloom.errors import ConfigError, DataError, ModelError, RunError
from fedloom.state import AdapterState
from fedloom.steps import Engine, Fit, Generate, LocalTraining, LoraSpec, Score, Tokens

SETUP = Setup("random:llama", device="cpu", lora=LoraSpec(4))
LOCAL = LocalTraining(epochs=2, batch_size=2)


def example(seed: int) -> Tokens:
    """24 tokens, of which the second half counts."""
    ids = torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokens(tuple(ids), (False,) * 12 + (True,) * 12)


def requests(adapter: AdapterState, group: int) -> Mapping[str, Any]:
    """What three clients ask for together."""
    own = [example(10 * group + i) for i in range(5)]
    return {
        "fit": Fit(adapter, own, LOCAL, group, stream=(f"client-{group}",)),
        "score": Score(own, adapter, per_token=True),
        "generate": Generate([own[0].ids[:4]], adapter, 8, temperature=1.0, stream=(f"client-{group}",)),
    }


def fingerprint(answers: Mapping[str, Any]) -> tuple[Any, ...]:
    return answers["fit"].adapter.sha256(), answers["fit"].loss, answers["score"], answers["generate"]


def forks(setup: Setup = SETUP, workers: int = 2) -> Pool:
    return Pool(ForkServer(setup, threads=1), workers, encode=lambda example: example)


@pytest.fixture(scope="module")
def alone() -> LoraEngine:
    return loading.load(SETUP, lambda example: example)[0]


@pytest.fixture(scope="module")
def start(alone: LoraEngine) -> AdapterState:
    return alone.layout.initial(0)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with forks() as pool:
        yield pool


def answered(engine: Engine, start: AdapterState, *, groups: int = 4, threads: int = 1) -> list[Any]:
    with ThreadPoolExecutor(threads) as executor:
        asked = [requests(start, group) for group in range(groups)]
        return [fingerprint(found) for found in executor.map(engine.answer, asked)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_no_bit(alone: LoraEngine, start: AdapterState, workers: int) -> None:
    with forks(workers=workers) as pool:
        assert answered(pool, start, threads=workers) == answered(alone, start)


def test_the_facts_are_those_of_an_engine_in_this_process(pool: Pool) -> None:
    assert pool.facts() == loading.load(SETUP, lambda example: example)[1]


def test_examples_are_encoded_once(start: AdapterState) -> None:
    asked: list[str] = []

    def encode(word: str) -> Tokens:
        asked.append(word)
        return example(len(word))

    words = ["one", "three"]
    with Pool(ForkServer(SETUP, threads=1), 1, encode=encode) as pool:
        for _ in range(2):
            pool.answer({"a": Score(words, start), "b": Score(words[:1], None)})
    assert asked == words


def test_a_killed_worker_is_replaced_and_its_batch_answered_all_the_same(
    alone: LoraEngine, start: AdapterState
) -> None:
    long = {"fit": Fit(start, [example(i) for i in range(50)], LOCAL, limit=400)}
    with forks() as pool, ThreadPoolExecutor(2) as executor:
        pool.facts()
        under_way = [executor.submit(pool.answer, long) for _ in range(2)]
        time.sleep(0.3)  # into the request; were it not, the test would still hold
        for worker in children(pool_server(pool)):
            os.kill(worker, signal.SIGKILL)
        found = [each.result()["fit"].adapter.sha256() for each in under_way]
    assert found == [alone.answer(long)["fit"].adapter.sha256()] * 2


def test_a_refused_request_comes_back_as_the_error_it_is(pool: Pool, start: AdapterState) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        pool.answer({0: Fit(start, [example(0)], LOCAL, seen=-1)})
    with pytest.raises(DataError, match="a label flag"):
        pool.answer({0: Score([Tokens((1, 2), (False,))], start)})


def test_whoever_comes_first_in_the_queue_is_served_first(start: AdapterState) -> None:
    busy = {0: Fit(start, [example(0)], LOCAL, limit=100)}
    short = {0: Score([example(0)], start)}
    with forks(workers=1) as pool, ThreadPoolExecutor(4) as executor:
        pool.facts()
        order: list[Ranked] = []
        first = executor.submit(pool.answer, busy)
        time.sleep(0.1)  # until it has the worker
        for asking in (pool.ranked(2), pool.ranked(1).ranked(7), pool.ranked(1).ranked(-7)):
            told = executor.submit(asking.answer, short)
            told.add_done_callback(lambda _, asking=asking: order.append(asking))
            time.sleep(0.1)
        assert not first.done()
    assert [asking.place for asking in order] == [(1, -7), (1, 7), (2,)]


def test_a_bug_in_a_worker_is_told_by_its_type_and_place_and_quotes_nothing(
    pool: Pool, start: AdapterState
) -> None:
    secret = "my own text"
    with pytest.raises(RunError, match=r"AttributeError at \w+\.py:\d+") as error:
        pool.answer({0: Score([[secret]], start)})  # type: ignore[list-item]  # no Tokens
    assert secret not in str(error.value)


def test_a_worker_answers_on_after_an_error(pool: Pool, alone: LoraEngine, start: AdapterState) -> None:
    for _ in range(3):
        with pytest.raises(ConfigError):
            pool.answer({0: Fit(start, [example(0)], LOCAL, seen=-1)})
    assert answered(pool, start) == answered(alone, start)


def test_a_base_model_that_cannot_be_loaded_is_refused_as_in_this_process() -> None:
    with forks(Setup("random:abacus", device="cpu")) as pool, pytest.raises(ModelError, match="abacus"):
        pool.facts()


class Mortal:
    """Workers that die of every question."""

    def __init__(self) -> None:
        self.started = 0

    def start(self, number: int) -> Mortal:
        self.started += 1
        return self

    def ask(self, letter: bytes) -> bytes:
        raise WorkerLost

    def close(self) -> None: ...


def test_requests_that_kill_three_workers_are_given_up(start: AdapterState) -> None:
    source = Mortal()
    with (
        Pool(source, 1, encode=lambda example: example) as pool,
        pytest.raises(RunError, match="3 workers in turn"),
    ):
        pool.answer({0: Score([], start)})
    assert source.started == 4  # three, and one for whatever is asked next


def test_a_closed_pool_leaves_no_process_and_answers_nobody(start: AdapterState) -> None:
    pool = forks()
    pool.facts()
    server = pool_server(pool)
    processes = [server, *children(server)]
    assert len(processes) == 3
    pool.close()
    assert gone(processes)
    with pytest.raises(RunError, match="stopped"):
        pool.answer({0: Score([], start)})


def test_whoever_waits_for_an_answer_is_told_when_the_pool_is_closed(start: AdapterState) -> None:
    endless = {0: Fit(start, [example(0)], LOCAL, limit=10**6)}
    with ThreadPoolExecutor(3) as executor, forks() as pool:
        pool.facts()
        waiting = [executor.submit(pool.answer, endless) for _ in range(3)]  # two are answered, one waits
        time.sleep(0.2)
        pool.close()
        assert all("stopped" in str(each.exception(timeout=20)) for each in waiting)


BUSY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from tests.engine.test_pool import LOCAL, SETUP, Fit, example, forks, pool_server, children
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.models import skeleton

start = AdapterLayout.of(skeleton("random:llama")[0], SETUP.lora).initial(0)
with forks() as pool:
    pool.facts()
    server = pool_server(pool)
    print(server, *children(server), flush=True)
    pool.answer({0: Fit(start, [example(0)], LOCAL, limit=10**6)})
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(end: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        processes = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(processes) == 3
        assert not gone(processes, wait=0)
        time.sleep(0.2)
        parent.send_signal(end)
    assert gone(processes)


ANSWERING = """#!{python}
import json, sys
for line in sys.stdin:
    print(json.dumps({{"tokens": [[7] for _ in json.loads(line)]}}), flush=True)
"""


def test_what_a_worker_has_started_for_vllm_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, exported = tmp_path / "python", tmp_path / "exported"
    stand_in.write_text(ANSWERING.format(python=sys.executable))
    stand_in.chmod(0o755)
    exported.mkdir()
    monkeypatch.setenv("TMPDIR", str(exported))  # where the worker writes adapters for vLLM
    setup = Setup("embedded", device="cpu", vllm={"python": str(stand_in)})
    adapter = loading.load(setup, lambda example: example)[0].initial_adapter(0)
    with forks(setup, workers=1) as pool:
        assert pool.answer({0: Generate([[3, 4]], adapter)}) == {0: [[7]]}
        [worker] = children(pool_server(pool))
        [vllm] = children(worker)
        assert list(exported.rglob("adapter_model.safetensors"))
    assert not list(exported.iterdir())
    assert gone([vllm])


def pool_server(pool: Pool) -> int:
    return pool._source._process.pid  # type: ignore[attr-defined,no-any-return]


def children(pid: int) -> list[int]:
    """Of any of its threads."""
    try:
        lists = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:  # it has ended meanwhile
        return []
    return [int(child) for told in lists for child in told.split()]


def gone(processes: list[int], *, wait: float = 20) -> bool:
    """Whether all of them end within some seconds; a zombie has ended."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + wait
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))
