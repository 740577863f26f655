"""From measurements to the summary: rows, the best and the mean of local-only clients, differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.experiment.summary import method_of, summarise
from fedloom.rows import Row
from fedloom.storage.files import read_summary, write_json
from tests.fakes import FOUR, dataset, experiment


def result(seed: int, **rows: tuple[float, float]) -> dict[str, Any]:
    named = {
        r.replace("local_", "local:"): {"metrics": {"rule": a, "loss": b}, "groups": {}}
        for r, (a, b) in rows.items()
    }
    return {"seed": seed, "rows": named, "samples": []}


TWO = [
    result(0, base=(0.0, 9.0), local_a=(0.5, 4.0), local_b=(0.25, 2.0), federated=(0.75, 1.0)),
    result(1, base=(0.25, 8.0), local_a=(0.25, 4.0), local_b=(0.75, 5.0), federated=(1.0, 3.0)),
]


def summary(results: list[dict[str, Any]] = TWO, **changes: Any) -> dict[str, Any]:
    return summarise(
        "compare",
        experiment(),
        dataset(FOUR),
        results,
        records=changes.get("records", []),
        adapter_sha256="f" * 64,
        engine={},
    )


def row(found: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    [one] = [r for r in found["rows"] if (r["row"], r["metric"]) == (name, metric)]
    return one


def test_questions_on_a_cut_prompt_are_counted_over_all_seeds() -> None:
    assert summary([{**TWO[0], "prompts_cut": 3}, {**TWO[1], "prompts_cut": 1}])["prompts_cut"] == 4
    assert summary()["prompts_cut"] == 0  # results from before they were counted


def test_rows_come_in_the_order_of_the_paper() -> None:
    names = list(dict.fromkeys(r["row"] for r in summary()["rows"]))
    assert names == ["base", "local mean", "local best", "federated", "local:a", "local:b"]


def test_the_best_local_client_is_chosen_in_each_seed_and_metric() -> None:
    assert row(summary(), "local best", "rule")["values"] == (0.5, 0.75)  # a, then b
    assert row(summary(), "local best", "loss")["values"] == (2.0, 4.0)  # b, then a: lower is better


def test_the_mean_over_local_clients_is_taken_in_each_seed() -> None:
    assert row(summary(), "local mean", "rule")["values"] == (0.375, 0.5)
    assert row(summary(), "local mean", "loss")["mean"] == 3.75  # ((4 + 2) / 2 + (4 + 5) / 2) / 2


def test_a_row_has_its_mean_interval_and_seeds() -> None:
    one = row(summary(), "federated", "rule")
    assert (one["mean"], one["seeds"], one["method"]) == (0.875, [0, 1], "fedavg")
    half = 12.7062047364 * 0.1767766953 / 2**0.5  # t of one degree, the deviation of 0.75 and 1.0
    assert one["ci95"] == pytest.approx((0.875 - half, 0.875 + half), rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    assert all(r["ci95"] is None for r in summary(TWO[:1])["rows"])


def test_differences_are_paired_by_seed_and_named_once() -> None:
    found = summary()["differences"]
    assert len(found) == 6 * 2  # pairs of four named rows, two metrics; single clients are left out
    [one] = [d for d in found if {d["a"], d["b"]} == {"federated", "local best"} and d["metric"] == "loss"]
    assert (one["a"], one["b"]) == ("federated", "local best")
    assert one["mean"] == -1.0  # ((1 - 2) + (3 - 4)) / 2
    assert one["p_value"] is None  # both seeds differ by the same


def test_a_client_that_one_seed_lacks_is_no_row_of_all() -> None:
    other = result(1, base=(0.0, 1.0), local_a=(0.0, 1.0), federated=(0.0, 1.0))
    assert "local:b" not in {r["row"] for r in summary([TWO[0], other])["rows"]}


def test_the_summary_is_json(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", summary())
    back = read_summary(tmp_path)
    assert back == json.loads(json.dumps(summary()))


def test_rounds_keep_what_a_plot_of_costs_needs() -> None:
    line = {"round": 1, "bytes_up": 10, "bytes_down": 20, "tokens": 30, "seconds": 0.5, "cohort": ["a"]}
    assert summary(records=[line])["rounds"] == [{k: v for k, v in line.items() if k != "cohort"}]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("base", "base"),
        ("federated", "fedpit"),
        ("federated personal:a", "fedpit"),
        ("centralised", "fedavg"),
        ("local:a", "local_only"),
        ("local best", "local_only"),
        ("LocIT+SA mean", "self_augmented"),
        ("Mine", "fedmit"),
    ],
)
def test_a_row_tells_its_method(name: str, method: str) -> None:
    toy = experiment(
        algorithm="fedpit", compare={"methods": {"LocIT+SA": "self_augmented", "Mine": "fedmit"}}
    )
    assert method_of(Row.parse(name), toy) == method


def test_metrics_that_only_some_rows_have_are_told_of_those() -> None:
    leaky = [
        {
            **one,
            "rows": {
                r: {**x, "metrics": {**x["metrics"], **({"auc": 0.5} if r == "federated" else {})}}
                for r, x in one["rows"].items()
            },
        }
        for one in TWO
    ]
    assert [r["row"] for r in summary(leaky)["rows"] if r["metric"] == "auc"] == ["federated"]
    assert not [d for d in summary(leaky)["differences"] if d["metric"] == "auc"]


# --- what counts of an AUC -------------------------------------------------------------------------------


def test_of_aucs_the_client_nearest_to_a_coin_is_the_best_and_differences_are_of_distances() -> None:
    def with_auc(one: dict[str, Any], **auc: float) -> dict[str, Any]:
        rows = {
            r: {**x, "metrics": {**x["metrics"], "auc": auc[r.replace(":", "_")]}}
            for r, x in one["rows"].items()
        }
        return {**one, "rows": rows}

    leaky = [with_auc(one, base=0.5, local_a=0.1, local_b=0.6, federated=0.25) for one in TWO]
    assert row(summary(leaky), "local best", "auc")["values"] == (0.6, 0.6)
    [one] = [
        d
        for d in summary(leaky)["differences"]
        if d["metric"] == "auc" and (d["a"], d["b"]) == ("federated", "local best")
    ]
    assert one["mean"] == pytest.approx(0.15)  # |0.25 - 1/2| - |0.6 - 1/2|


# --- taking part or not ----------------------------------------------------------------------------------


def mixed(seed: int, **federated: float) -> dict[str, Any]:
    """Client a holds "low" only, b one of "low" and three of "high"; ten answers a group; alone both have one half everywhere."""
    half = {"low": {"rule": 0.5}, "high": {"rule": 0.5}}
    groups = {g: {"rule": x} for g, x in federated.items()}
    rows = {"federated": groups, "local:a": half, "local:b": half}
    return {
        "seed": seed,
        "rows": {r: {"metrics": {"rule": 0.5}, "groups": g} for r, g in rows.items()},
        "samples": [],
        "mix": {"a": {"low": 3, "high": 0}, "b": {"low": 1, "high": 3}},
        "answered": {"low": 10, "high": 10},
    }


def test_a_client_gains_where_the_shared_model_is_better_on_its_own_mix() -> None:
    found = summary([mixed(0, low=0.9, high=0.3)])["own_mix"]["rule"]
    clients = found["seeds"][0]["clients"]
    assert clients["a"] == {"shared": 0.9, "alone": 0.5, "outcome": "gain"}
    assert clients["b"]["shared"] == pytest.approx(0.45)  # (1 * 0.9 + 3 * 0.3) / 4
    assert clients["b"]["outcome"] == "lose"
    assert (found["gain"]["mean"], found["tie"]["mean"], found["lose"]["mean"]) == (1, 0, 1)
    assert found["gain"]["ci95"] is None


def test_less_than_one_answer_is_a_tie_and_one_answer_is_not() -> None:
    # One answer of "low" weighs a tenth of b's quarter; the shared model has 0.01 more in all.
    almost = summary([mixed(0, low=0.6, high=0.48)])["own_mix"]["rule"]["seeds"][0]["clients"]
    assert almost["b"]["shared"] == pytest.approx(0.51)
    assert almost["b"]["outcome"] == "tie"
    assert almost["a"]["outcome"] == "gain"  # 0.1 more: one of its ten answers


def test_gains_are_counted_in_each_seed_and_the_interval_is_over_seeds() -> None:
    found = summary([mixed(0, low=0.9, high=0.3), mixed(1, low=0.9, high=0.9)])["own_mix"]["rule"]
    assert found["gain"]["values"] == (1, 2)
    half = 12.7062047364 * 0.5  # t of one degree, times the standard error of 1 and 2
    assert found["gain"]["ci95"] == pytest.approx((1.5 - half, 1.5 + half), rel=1e-6)


def test_a_client_with_a_group_that_nobody_was_asked_about_is_not_counted() -> None:
    one = mixed(0, low=0.9, high=0.3)
    del one["rows"]["federated"]["groups"]["high"]
    assert set(summary([one])["own_mix"]["rule"]["seeds"][0]["clients"]) == {"a"}


def test_results_of_an_earlier_version_have_no_mix_and_tell_nothing_of_it() -> None:
    assert summary()["own_mix"] == {}


# --- who, when, from what --------------------------------------------------------------------------------


def test_a_summary_says_when_and_from_what_it_was_made_and_no_more_of_a_path_than_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FEDLOOM_RUN_BY", raising=False)
    toy = experiment(data={"source": "medquad", "path": "/home/somebody/medquad.jsonl"})
    found = summarise(
        "run", toy, dataset(FOUR), TWO, records=[], adapter_sha256="f" * 64, engine={}, when=(0.0, 3600.0)
    )["provenance"]
    assert found["started"] == "1970-01-01T00:00:00+00:00"
    assert found["finished"] == "1970-01-01T01:00:00+00:00"
    assert (found["source"], found["files"], found["licence"]) == ("medquad", ["medquad.jsonl"], "CC-BY-4.0")
    assert found["data_sha256"] == dataset(FOUR).sha256()
    assert found["by"] is None


def test_who_ran_it_is_said_where_they_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_RUN_BY", "The hospital's data team")
    assert summary()["provenance"]["by"] == "The hospital's data team"
