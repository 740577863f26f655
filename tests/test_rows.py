"""The names of rows, as files hold them."""

from __future__ import annotations

import pytest

from fedloom.rows import Row, is_single, local

ROWS = {
    "base": Row("base", "base"),
    "federated": Row("federated", "global"),
    "FewFedPIT, beta = 0.5": Row("FewFedPIT, beta = 0.5", "global"),
    "centralised": Row("centralised", "pooled"),
    "Local-12": Row("Local-12", "personal"),
    "local:a": Row("local", "personal", "a"),
    "local:ward 3: nights": Row("local", "personal", "ward 3: nights"),
    "local mean": Row("local", "personal", statistic="mean"),
    "LocIT+SA best": Row("LocIT+SA", "personal", statistic="best"),
    "LocIT+SA:a": Row("LocIT+SA", "personal", "a"),
    "federated personal:a": Row("federated", "personal", "a", beside=True),
    "federated personal best": Row("federated", "personal", statistic="best", beside=True),
}


@pytest.mark.parametrize("text", ROWS)
def test_a_row_is_read_from_its_name(text: str) -> None:
    assert Row.parse(text) == ROWS[text]


@pytest.mark.parametrize("text", [*ROWS, "", ":", "a:", "Local-x", " mean"])
def test_a_row_prints_as_the_name_it_was_read_from(text: str) -> None:
    assert str(Row.parse(text)) == text


def test_a_single_client_s_row_becomes_the_mean_over_all_clients_of_its_kind() -> None:
    assert str(Row.parse("FedPIT personal:a").over("mean")) == "FedPIT personal mean"
    assert str(local("a").over("best")) == "local best"


def test_only_rows_of_one_client_are_single() -> None:
    assert [row for row in ROWS if is_single(row)] == [
        "local:a",
        "local:ward 3: nights",
        "LocIT+SA:a",
        "federated personal:a",
    ]


def test_an_owner_of_categories_is_told_from_clients_and_their_means() -> None:
    assert [row for row in ROWS if Row.parse(row).specialist] == ["Local-12"]


def test_clients_of_the_local_only_baseline_are_told_from_those_of_methods() -> None:
    assert [row for row in ROWS if Row.parse(row).alone] == ["local:a", "local:ward 3: nights"]
