from __future__ import annotations

from typing import Any

import pytest

from fedloom.report import findings


def summary(
    values: dict[str, float],
    gap: tuple[float, float, float] | None = None,
    *,
    metric: str = "rule",
    seeds: int = 5,
) -> dict[str, Any]:
    """One metric; `gap` is mean, low and high of federated - local best."""
    rows = [
        {"row": r, "metric": metric, "mean": x, "ci95": None, "values": [x], "seeds": list(range(seeds))}
        for r, x in values.items()
    ]
    found = {"a": "federated", "b": "local best", "metric": metric, "p_value": 0.01}
    if gap is None:
        gap_ = {"mean": values.get("federated", 0) - values.get("local best", 0), "ci95": None}
    else:
        gap_ = {"mean": gap[0], "ci95": [gap[1], gap[2]]}
    return {
        "rows": rows,
        "differences": [{**found, **gap_}],
        "experiment": {"algorithm": {"name": "fedavg"}},
    }


TABLE = {"base": 0.1, "local mean": 0.2, "local best": 0.3, "federated": 0.71}


def test_the_verdict_names_both_rows_the_difference_its_interval_and_the_seeds() -> None:
    assert findings.verdict(summary(TABLE, (0.41, 0.35, 0.47)))[0] == (
        "Federated tuning answers 71% of held-out instructions right, against 30% for the best single "
        "client: 41 points more (95% interval +35 to +47, 5 seeds)."
    )


def test_an_interval_that_includes_zero_is_said_to_show_nothing() -> None:
    said = findings.verdict(summary({**TABLE, "federated": 0.33}, (0.03, -0.02, 0.08)))
    assert "includes zero" in said[1]


def test_an_interval_that_excludes_zero_is_not_hedged() -> None:
    assert "includes zero" not in " ".join(findings.verdict(summary(TABLE, (0.41, 0.35, 0.47))))


def test_a_single_seed_is_said_to_give_no_interval() -> None:
    said = findings.verdict(summary(TABLE, seeds=1))
    assert "interval" not in said[0]
    assert "one seed, which gives no interval" in said[1]


def test_a_federated_row_that_loses_is_said_to_be_less() -> None:
    assert (
        "20.0 points less"
        not in findings.verdict(summary({**TABLE, "federated": 0.1}, (-0.2, -0.3, -0.1)))[0]
    )
    assert (
        "20 points less (95% interval −30 to −10"
        in findings.verdict(summary({**TABLE, "federated": 0.1}, (-0.2, -0.3, -0.1)))[0]
    )


def test_of_losses_the_lower_is_said_to_be_lower() -> None:
    said = findings.verdict(
        summary({"base": 3.0, "local best": 2.1, "federated": 1.9}, (-0.2, -0.3, -0.1), metric="loss")
    )
    assert said[0].startswith(
        "Federated tuning reaches a held-out loss of 1.900 nats per token, against 2.100"
    )
    assert "0.200 lower" in said[0]


def test_a_local_only_run_is_told_as_one() -> None:
    said = findings.verdict(summary({"base": 0.1, "local mean": 0.2, "local best": 0.3}, seeds=1))
    assert said[0].startswith("Tuned alone, the best client answers 30%")


def test_the_rule_leads_then_rouge_then_the_rest() -> None:
    rows = [{"row": "base", "metric": m} for m in ("loss", "exact", "rouge_l")]
    assert findings.metrics({"rows": rows}) == ["rouge_l", "exact", "loss"]
    assert findings.main_metric({"rows": [*rows, {"row": "base", "metric": "rule"}]}) == "rule"


def test_the_lowest_loss_and_the_highest_share_are_best() -> None:
    names = ["base", "federated"]
    assert findings.best(summary({"base": 3.0, "federated": 1.0}, metric="loss"), names, "loss") == {
        "federated"
    }
    assert findings.best(summary({"base": 3.0, "federated": 1.0}), names, "rule") == {"base"}


def test_equal_rows_are_best_together() -> None:
    table = summary({"base": 0.1, "local best": 0.5, "federated": 0.5})
    assert findings.best(table, list(TABLE), "rule") == {"local best", "federated"}


def test_where_all_rows_are_equal_none_is_best() -> None:
    assert findings.best(summary({"base": 0.0, "federated": 0.0}), ["base", "federated"], "rule") == set()


def test_a_difference_is_found_either_way_round() -> None:
    s = summary(TABLE, (0.41, 0.35, 0.47))
    assert findings.difference(s, "local best", "federated", "rule") == (-0.41, (-0.47, -0.35))


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_400_000, "5.4 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes_are_written_in_powers_of_1000(count: float, written: str) -> None:
    assert findings.byte_size(count) == written


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")]
)
def test_times_are_written_for_people(seconds: float, written: str) -> None:
    assert findings.duration(seconds) == written
