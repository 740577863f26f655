from __future__ import annotations

from typing import Any

import pytest

from fedloom.report import drawing, figures, round_figures, rounds


def partition(clients: int, groups: int, *, each: int = 2) -> dict[str, Any]:
    names = [f"group {g}" for g in range(groups)]
    counts = [
        {n: 10 * (g in {(k + j) % groups for j in range(each)}) for g, n in enumerate(names)}
        for k in range(clients)
    ]
    held = [
        {"client": f"client-{k:03d}", "size": 10 * each, "counts": c, "distance": 0.5}
        for k, c in enumerate(counts)
    ]
    return {"by": "category", "distance": 0.5, "totals": dict.fromkeys(names, 10), "clients": held}


def record(
    round: int,
    *,
    took_part: list[str],
    refused: dict[str, str] | None = None,
    cohort: list[str] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    refused = refused or {}
    return {
        "round": round,
        "cohort": cohort or [*took_part, *refused],
        "clients": {c: {} for c in took_part},
        "refused": refused,
        "loss": None,
        "held_out": None,
        "bytes_up": 0,
        "bytes_down": 0,
        **rest,
    }


def test_few_clients_lie_with_their_names() -> None:
    figure = figures.partition_figure(partition(9, 9, each=1))
    assert figure.data[0].orientation == "h"
    assert len(figure.layout.yaxis.ticktext) == 9


def test_a_hundred_clients_stand_and_only_some_are_named() -> None:
    figure = figures.partition_figure(partition(100, 8))
    assert figure.data[0].orientation == "v"
    assert 8 <= len(figure.layout.xaxis.ticktext) <= 12
    assert figure.layout.height <= 500


def test_ten_thousand_clients_are_thinned() -> None:
    assert len(figures.partition_figure(partition(10_000, 2)).data[0].x) == drawing.SHOWN_CLIENTS


def test_one_group_a_client_needs_no_legend() -> None:
    assert not any(trace.showlegend for trace in figures.partition_figure(partition(9, 9, each=1)).data)


def test_every_example_is_in_a_bar() -> None:
    assert (
        sum(sum(trace.x) for trace in figures.partition_figure(partition(9, 4)).data) == 180
    )  # 9 clients * 2 groups * 10


def test_long_names_that_begin_alike_keep_bars_of_their_own() -> None:
    table = partition(2, 2)
    for k, client in enumerate(table["clients"]):
        client["client"] = "x" * 80 + str(k)
    assert list(figures.partition_figure(table).data[0].y) == [0, 1]


def test_a_name_with_markup_is_shown_not_obeyed() -> None:
    table = partition(2, 2)
    table["clients"][0]["client"] = '<a href="x">'
    assert figures.partition_figure(table).layout.yaxis.ticktext[0] == "&lt;a href=&quot;x&quot;&gt;"


@pytest.mark.parametrize(
    ("client", "did"), [("a", "took part"), ("b", "refused"), ("c", "no answer"), ("d", "not selected")]
)
def test_what_a_client_did_in_a_round(client: str, did: str) -> None:
    seen = record(1, took_part=["a"], refused={"b": "shape"}, cohort=["a", "b", "c"])
    assert rounds.part(seen, client) == did


def test_participation_leaves_out_the_round_before_the_first() -> None:
    figure = round_figures.participation_figure(
        ["a", "b"], [record(0, took_part=[]), record(1, took_part=["a"])]
    )
    assert list(figure.data[0].x) == [1]


def test_the_legend_of_participation_names_only_what_happened() -> None:
    figure = round_figures.participation_figure(["a"], [record(1, took_part=["a"])])
    assert [trace.name for trace in figure.data[1:]] == ["took part"]


def losses(*values: float | None) -> list[dict[str, Any]]:
    return [
        record(r, took_part=[], held_out=None if v is None else {"loss": v}) for r, v in enumerate(values)
    ]


def test_the_thick_line_is_the_mean_over_seeds() -> None:
    figure = round_figures.loss_figure({"federated": [losses(3.0, 1.0), losses(4.0, 2.0)]}, what="held_out")
    assert list(figure.data[-1].y) == [3.5, 1.5]  # (3 + 4) / 2, (1 + 2) / 2


def test_rounds_without_an_evaluation_are_left_out_of_the_curve() -> None:
    assert rounds.loss_curve(losses(3.0, None, 1.0), what="held_out") == {0: 3.0, 2: 1.0}


def test_the_base_line_is_the_loss_before_the_first_round() -> None:
    assert rounds.base_loss({"federated": [losses(3.0, 1.0), losses(5.0, 2.0)]}) == 4.0  # (3 + 5) / 2


def test_curves_of_seeds_that_are_not_as_far_average_what_they_share() -> None:
    assert rounds.mean_curve([{0: 1.0, 1: 2.0}, {0: 3.0}]) == {0: 2.0}


def test_bytes_add_up() -> None:
    rounds = [record(r, took_part=[], bytes_up=2_000_000, bytes_down=3_000_000) for r in range(3)]
    figure = round_figures.bytes_figure(rounds)
    assert list(figure.data[0].y) == [2.0, 4.0, 6.0]  # MB
    assert figure.layout.yaxis.title.text == "MB"


def test_a_run_that_sends_nothing_has_a_figure_all_the_same() -> None:
    assert round_figures.bytes_figure([record(1, took_part=[])]).layout.yaxis.title.text == "bytes"


def test_groups_that_a_row_lacks_are_left_empty() -> None:
    figure = figures.groups_figure({"base": {"a": 0.5, "b": 0.25}, "federated": {"a": 1.0}}, "rule")
    assert list(map(list, figure.data[0].z)) == [[0.5, 0.25], [1.0, None]]


def test_a_lower_loss_has_the_fuller_colour() -> None:
    assert figures.groups_figure({"base": {"a": 3.0}, "federated": {"a": 1.0}}, "loss").data[0].reversescale


def test_figures_have_no_ground_of_their_own() -> None:
    assert figures.partition_figure(partition(3, 2)).layout.paper_bgcolor == "rgba(0,0,0,0)"
