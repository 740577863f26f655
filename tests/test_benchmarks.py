"""The benchmarks do the work that they say, and stop where results differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import aggregation, contest, generation, peers, rounds, training, workload
from benchmarks.contest import Report, Row, Times
from benchmarks.workload import Work
from fedloom import lora
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Fit

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


def test_slots_are_as_wide_as_the_longest_of_each_micro_batch():
    assert workload.slots([3, 9, 4], micro_batch=2, multiple=8) == 40  # 2 * 16 + 1 * 8
    assert workload.slots([3, 9, 4], micro_batch=2) == 22  # 2 * 9 + 1 * 4


def test_padding_and_labelled_shares_are_of_all_slots():
    work = Work(tokens=30, labelled=10, slots=40)
    assert (work.padding, work.labelled_share) == (0.25, 0.25)


def test_the_15m_model_needs_what_the_arithmetic_says():
    model = workload.llama("15M", device="meta")
    layer = 4 * 288 * 288 + 3 * 288 * 768
    assert workload.flops(model, tokens=1, head_rows=0) == 4 * 6 * layer
    assert workload.flops(model, tokens=0, head_rows=1) == 4 * 288 * 32000
    assert workload.flops(model, tokens=1, head_rows=1) / 1e6 == pytest.approx(60.75, abs=0.01)


def test_lengths_are_those_of_dolly():
    encode = workload.shepherd_tokens(workload.tokenizer())
    found = workload.lengths_of([encode(e) for mine in workload.clients(20, 20) for e in mine])
    assert 40 <= found["p5"] <= 60
    assert 120 <= found["p50"] <= 170
    assert found["p95"] == pytest.approx(512, abs=60)
    assert 165 <= found["mean"] <= 205


def test_about_a_third_of_the_tokens_is_response():
    encode = workload.openfedllm_tokens(workload.tokenizer())
    found = workload.lengths_of([encode(e) for mine in workload.clients(20, 20) for e in mine])
    assert 0.3 <= found["labelled"] <= 0.42


def test_no_word_of_the_workload_is_unknown_to_its_tokenizer():
    tokenizer = workload.tokenizer()
    for encode in (workload.shepherd_tokens(tokenizer), workload.openfedllm_tokens(tokenizer)):
        ids = {i for mine in workload.clients(3, 5) for e in mine for i in encode(e).ids}
        assert tokenizer.unk_token_id not in ids


def test_arranged_examples_come_back_in_the_recorded_order():
    setting = replace(training.B1, batch=4)
    examples = workload.clients(1, 10)[0]
    arranged = rounds.arranged(examples, setting.local, ("c", 0))
    fit = Fit(AdapterState({}), arranged, setting.local, stream=("c", 0))
    taken = [arranged[i] for batch in rounds.batches(fit) for i, _ in batch]
    assert taken == examples


@pytest.mark.parametrize("id", ["B1", "B3"])
def test_a_round_beside_trainer_is_the_same_work(id):
    _, peer = training.contestant(training.BENCHMARKS[id], {})
    assert training.small_copy_differs(training.BENCHMARKS[id], peer) <= contest.EXACT


def test_a_round_that_differs_is_not_timed():
    benchmark = training.BENCHMARKS["B1"]
    _, peer = training.contestant(benchmark, {})

    def cheats(model, setting, start, data):
        outcome = peer(model, setting, start, data)
        outcome.adapter = outcome.adapter + 1e-9
        return outcome

    with pytest.raises(AssertionError, match="not the same work"):
        training.small_copy_differs(benchmark, cheats)


def test_a_fedpit_round_gives_the_same_tokens_and_adapters():
    assert generation.small_copy_differs(new=3) <= contest.EXACT


def test_products_that_differ_are_not_timed(monkeypatch):
    assert len(aggregation.measure(scale="tiny", repeats=2)["cpu"]) == 2
    monkeypatch.setattr(aggregation, "mean_product", lambda parts: parts[0][1])
    with pytest.raises(AssertionError, match="not the same work"):
        aggregation.measure(scale="tiny", repeats=1)


def test_differences_are_measured_against_what_was_learnt():
    start, learnt = AdapterState({"x": torch.zeros(4)}), AdapterState({"x": torch.ones(4)})
    assert contest.relative_difference(learnt * 1.5, learnt, start) == pytest.approx(0.5)  # |0.5| / |1|


def test_a_difference_that_is_not_a_number_is_not_equal():
    with pytest.raises(AssertionError):
        contest.must_be("adapters", float("nan"), 1.0)


def test_the_smallest_time_is_compared_and_the_spread_is_shown():
    rows = [
        Row("peer", Times([4.0, 6.0, 8.0]), 10, 0.5, 0.4),
        Row("ours", Times([2.0, 1.0]), 10, 0.0, 1.0, 2e9, 4e9),
    ]
    peer, ours = contest.cells(Report("B1", "", "real", rows, {}, {}))
    assert peer[1] == "6.00 (4.00-8.00)"
    assert ours[4] == "4.0"  # 4 s / 1 s
    assert ours[-1] == "50%"  # 2 GFLOP in 1 s of 4 GFLOP/s


def test_contestants_take_turns():
    order = []

    def of(name):
        return lambda: (order.append(name), contest.Stopwatch())[1]

    contest.take_turns({"a": of("a"), "b": of("b")}, repeats=2, wall=False)
    assert order == ["a", "b", "a", "b"]


def test_a_clone_at_another_commit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="git checkout bcffa00"):
        peers.check(tmp_path, "bcffa00", "https://example.org/peer")


def test_the_table_of_the_page_is_made_from_the_record():
    page = everything.PAGE.read_text("utf-8")
    assert everything.with_table(page, everything.recorded()) == page


def test_what_was_not_measured_says_so():
    assert everything.table({}).count("not yet measured") == len(everything.TITLES)


def test_the_start_of_a_round_is_no_adapter_that_changes_nothing():
    setting = training.BENCHMARKS["B1"].small
    start = training.start_of(setting, torch.float64)
    layout = AdapterLayout.of(workload.llama(setting.size), setting.lora)
    assert all(float(start[lora.key(target.key, "B")].norm()) > 0 for target in layout)
