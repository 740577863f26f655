from __future__ import annotations

from typing import Any

import pytest

from fedloom.report import findings, terms, verdict
from fedloom.statistics import estimate


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
    assert verdict.verdict(summary(TABLE, (0.41, 0.35, 0.47)))[0] == (
        "Federated tuning answers 71% of held-out instructions right, against 30% for the best single "
        "client: 41 points more (95% interval +35 to +47, 5 seeds)."
    )


@pytest.mark.parametrize("name", ["fewfedpit", "ppfedit"])
def test_the_federated_row_is_called_by_the_title_of_its_algorithm(name: str) -> None:
    said = {**summary(TABLE), "experiment": {"algorithm": {"name": name}}}
    assert terms.title("federated", findings.own(said)) == "Federated (FewFedPIT)"


def test_an_interval_that_includes_zero_is_said_to_show_nothing() -> None:
    said = verdict.verdict(summary({**TABLE, "federated": 0.33}, (0.03, -0.02, 0.08)))
    assert "includes zero" in said[1]


def test_an_interval_that_excludes_zero_is_not_hedged() -> None:
    assert "includes zero" not in " ".join(verdict.verdict(summary(TABLE, (0.41, 0.35, 0.47))))


def test_a_single_seed_is_said_to_give_no_interval() -> None:
    said = verdict.verdict(summary(TABLE, seeds=1))
    assert "interval" not in said[0]
    assert "one seed, which gives no interval" in said[1]


def test_a_federated_row_that_loses_is_said_to_be_less() -> None:
    assert (
        "20.0 points less" not in verdict.verdict(summary({**TABLE, "federated": 0.1}, (-0.2, -0.3, -0.1)))[0]
    )
    assert (
        "20 points less (95% interval −30 to −10"
        in verdict.verdict(summary({**TABLE, "federated": 0.1}, (-0.2, -0.3, -0.1)))[0]
    )


def test_of_losses_the_lower_is_said_to_be_lower() -> None:
    said = verdict.verdict(
        summary({"base": 3.0, "local best": 2.1, "federated": 1.9}, (-0.2, -0.3, -0.1), metric="loss")
    )
    assert said[0].startswith(
        "Federated tuning reaches a held-out loss of 1.900 nats per token, against 2.100"
    )
    assert "0.200 lower" in said[0]


def compared(**means: float) -> dict[str, Any]:
    """Federated 0.38 beside clients alone at 0.09 at best, and what `means` says."""
    found = summary(
        {"base": 0.05, "local mean": 0.07, "local best": 0.09, "federated": 0.38, **means}, (0.29, 0.2, 0.38)
    )
    found["experiment"]["compare"] = {
        "methods": {"FedMIT": {"name": "fedmit"}, "LocIT+SA": {"name": "self_augmented"}}
    }
    return found


def test_the_headline_names_the_strongest_rival_and_not_the_first() -> None:
    said = verdict.verdict(compared(**{"FedMIT": 0.54, "LocIT+SA mean": 0.2, "LocIT+SA best": 0.46}))
    assert "against 54% for FedMIT: 16 points less" in said[0]
    assert "Better on average are FedMIT (54.0%) and the best client of LocIT+SA (46.0%)." in said


def test_clients_alone_are_a_rival_whatever_method_they_tune_by() -> None:
    said = verdict.verdict(compared(**{"FedMIT": 0.2, "LocIT+SA best": 0.46}))
    assert "against 46.0% for the best client of LocIT+SA: 8.0 points less" in said[0]


def test_the_base_is_no_rival_where_there_are_others_even_weaker_ones() -> None:
    worse = {"base": 0.5, "local mean": 0.2, "local best": 0.3, "federated": 0.4}
    assert "against 30% for the best single client" in verdict.verdict(summary(worse, (0.1, 0.05, 0.15)))[0]
    assert "Better on average is the untuned base model (50.0%)." in verdict.verdict(
        summary(worse, (0.1, 0.05, 0.15))
    )


def test_where_the_base_is_all_there_is_it_is_the_rival() -> None:
    assert "for the untuned base model" in verdict.verdict(summary({"base": 0.1, "federated": 0.4}))[0]


def test_of_losses_the_strongest_rival_has_the_lowest() -> None:
    said = verdict.verdict(
        summary({"base": 3.0, "local best": 2.1, "Mine": 1.5, "federated": 1.9}, metric="loss")
    )
    assert "against 1.500 for Mine: 0.400 higher" in said[0]
    assert "Better on average is Mine (1.500)." in said


def test_centralised_tuning_is_no_choice_of_a_client_but_is_named_where_it_does_better() -> None:
    said = verdict.verdict(summary({**TABLE, "centralised": 0.8}, (0.41, 0.35, 0.47)))
    assert "for the best single client" in said[0]
    assert "Better on average is centralised tuning on the pooled data (80.0%)." in said


def test_a_better_row_that_the_seeds_do_not_tell_apart_is_marked() -> None:
    table = summary({"base": 0.1, "local best": 0.45, "federated": 0.4}, (-0.05, -0.2, 0.1))
    assert "Better on average is the best single client (45.0%, not clearly)." in verdict.verdict(table)


def with_own_mix(*gains: int, clients: int = 8) -> dict[str, Any]:
    """Seeds in which so many clients gain, two tie and the others lose."""
    found = summary(TABLE, (0.41, 0.35, 0.47), seeds=len(gains))
    counts = {"gain": gains, "tie": [2] * len(gains), "lose": [clients - 2 - g for g in gains]}
    seeds = [{"seed": i, "clients": {f"c{c}": {} for c in range(clients)}} for i in range(len(gains))]
    table = {
        o: {"mean": e.mean, "ci95": e.ci95, "values": e.values}
        for o, n in counts.items()
        for e in [estimate(n)]
    }
    return {**found, "own_mix": {"rule": {"seeds": seeds, **table}}}


def test_who_gains_on_their_own_mix_is_said_with_intervals_over_seeds() -> None:
    said = verdict.taking_part(with_own_mix(2, 4, 3))
    # t of two degrees, 4.303, times the standard error of 2, 4 and 3, 0.577: 3 - 2.5 and 3 + 2.5
    assert said == [
        "Taking part or tuning alone, each judged on its own mix of data (Answered right): of 8 clients 3.0 (0.5 to 5.5) gain "
        "by taking part, 2.0 (2.0 to 2.0) tie and 3.0 (0.5 to 5.5) lose (means over 3 seeds, 95% intervals)."
    ]
    assert said[0] in verdict.verdict(with_own_mix(2, 4, 3))


def test_an_interval_of_a_count_is_cut_at_what_there_can_be() -> None:
    assert "1.0 (0.0 to 8.0) gain" in verdict.taking_part(with_own_mix(0, 2))[0]


def test_of_one_seed_the_clients_that_gain_are_counted_without_an_interval() -> None:
    assert verdict.taking_part(with_own_mix(2)) == [
        "Taking part or tuning alone, each judged on its own mix of data (Answered right): of 8 clients 2 gain by taking part, "
        "2 tie and 4 lose; one seed, so no interval."
    ]


def test_where_few_questions_are_asked_the_loss_tells_of_the_clients_that_answers_do_not() -> None:
    table = with_own_mix(2)
    loss = table["own_mix"]["rule"]
    few = {**loss, "seeds": [{"seed": 0, "clients": {"c0": {}}}]}
    rows = [*table["rows"], *({**r, "metric": "loss"} for r in table["rows"])]
    said = verdict.taking_part({**table, "rows": rows, "own_mix": {"loss": loss, "rule": few}})
    assert "(Held-out loss): of 8 clients" in said[0]


def test_an_earlier_summary_tells_nothing_of_own_mixes() -> None:
    assert verdict.taking_part(summary(TABLE)) == []


def test_an_auc_is_best_nearest_to_a_coin() -> None:
    table = summary({"base": 0.5, "federated": 0.2, "FedMIT": 0.6}, metric="auc")
    assert findings.best(table, ["base", "federated", "FedMIT"], "auc") == {"FedMIT"}
    assert terms.arrow("auc") == "→ 0.5"


def test_a_local_only_run_is_told_as_one() -> None:
    said = verdict.verdict(summary({"base": 0.1, "local mean": 0.2, "local best": 0.3}, seeds=1))
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
    assert terms.byte_size(count) == written


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")]
)
def test_times_are_written_for_people(seconds: float, written: str) -> None:
    assert terms.duration(seconds) == written
