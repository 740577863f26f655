"""Comparisons of many methods: what the page, the card and the terminal call their rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom.cli import display
from fedloom.report import findings, tables, terms, verdict

Folder = Callable[..., Path]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def terminal(summary: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(display.results_table(summary, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("row", "title", "model"),
    [
        ("base", "Base model, untuned", "base"),
        ("federated", "Federated (FewFedPIT)", "global"),
        ("centralised", "Centralised, pooled data", "pooled"),
        ("local mean", "Local only, mean of clients", "personal, mean"),
        ("local:client-003", "client-003, alone", "personal"),
        ("FedIT", "FedIT", "global"),
        ("LocIT+SA best", "LocIT+SA, best client", "personal, best"),
        ("FedPIT v1 personal mean", "FedPIT v1, personal, mean of clients", "personal, mean"),
        ("FedPIT v1 personal:client-003", "FedPIT v1, personal, client-003", "personal"),
        ("federated personal mean", "Federated (FewFedPIT), personal, mean of clients", "personal, mean"),
    ],
)
def test_a_row_says_whose_model_it_is(row: str, title: str, model: str) -> None:
    assert (terms.title(row, "FewFedPIT"), terms.model(row)) == (title, model)


def test_the_page_has_every_named_row_with_its_model(methods_folder: Folder) -> None:
    summary = read(methods_folder())
    table = tables.table(summary, findings.rows(summary))
    assert [(line["title"], line["model"]) for line in table] == [
        ("Base model, untuned", "base"),
        ("Local only, mean of clients", "personal, mean"),
        ("Local only, best client", "personal, best"),
        ("FedPIT v1, personal, mean of clients", "personal, mean"),
        ("FedPIT v1, personal, best client", "personal, best"),
        ("LocIT+SA, mean of clients", "personal, mean"),
        ("LocIT+SA, best client", "personal, best"),
        ("FedIT", "global"),
        ("FedPIT v1", "global"),
        ("Few 0.2", "global"),
        ("Federated (FewFedPIT)", "global"),
        ("Centralised, pooled data", "pooled"),
    ]


def test_a_row_that_was_not_attacked_has_dashes(methods_folder: Folder) -> None:
    summary = read(methods_folder())
    table = {line["title"]: line["cells"] for line in tables.table(summary, findings.rows(summary))}
    at = findings.metrics(summary).index("exposure")
    assert table["Local only, mean of clients"][at]["value"] == "–"
    assert table["FedIT"][at]["value"] != "–"


def test_of_leakage_the_tuned_model_that_leaks_least_is_best(methods_folder: Folder) -> None:
    summary = read(methods_folder())
    assert findings.best(summary, findings.rows(summary), "exposure") == {"Few 0.2"}  # base leaks less still


def test_no_single_client_is_a_row_of_the_table(methods_folder: Folder) -> None:
    summary = read(methods_folder())
    assert not [row for row in findings.rows(summary) if ":" in row]
    assert len(findings.single_clients(summary)) == 12  # three kinds of four clients


def test_many_differences_are_split_into_those_of_the_federated_row_and_the_rest(
    methods_folder: Folder,
) -> None:
    parts = tables.differences(read(methods_folder()))["rule"]
    assert all("Federated" in (d["a"], d["b"]) for d in parts["first"])
    assert len(parts["first"]) + len(parts["others"]) == 66  # 12 rows: 12 * 11 / 2


def test_five_rows_keep_their_differences_together(compare_folder: Folder) -> None:
    parts = tables.differences(read(compare_folder()))["rule"]
    assert (len(parts["first"]), parts["others"]) == (10, [])


def test_the_verdict_compares_with_fedit_in_quality_and_exposure(methods_folder: Folder) -> None:
    said = " ".join(verdict.verdict(read(methods_folder())))
    assert "by FewFedPIT" in said
    assert "In quality, FewFedPIT is at" in said
    assert "In leakage, FewFedPIT is at 2.5" in said
    assert "FewFedPIT leaks less." in said


def test_a_difference_in_leakage_within_chance_is_told_as_one(methods_folder: Folder) -> None:
    summary = read(methods_folder())
    for d in summary["differences"]:
        d["ci95"] = [-5.0, 5.0]
    said = " ".join(verdict.verdict(summary))
    assert said.count("do not tell the two apart") == 2
    assert "leaks less" not in said


def test_fedit_is_not_compared_with_itself(compare_folder: Folder) -> None:
    assert "In quality" not in " ".join(verdict.verdict(read(compare_folder())))


@pytest.mark.parametrize("width", [70, 80, 100, 120])
def test_a_narrow_terminal_loses_metrics_and_never_names(methods_folder: Folder, width: int) -> None:
    said = terminal(read(methods_folder()), width)
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    assert all(name in said for name in ("FedPIT v1 personal mean", "global", "rule", "exposure"))


def test_the_terminal_names_models_and_leaves_best_clients_of_methods_to_the_page(
    methods_folder: Folder,
) -> None:
    shown = terminal(read(methods_folder()), width=200)
    assert re.search(r"federated \(FewFedPIT\) +│ global", shown)
    assert "LocIT+SA mean" in shown
    assert "local best" in shown
    assert "LocIT+SA best" not in shown
    assert "LocIT+SA:" not in shown


def test_the_terminal_drops_exact_only_where_leakage_is_shown(
    methods_folder: Folder, compare_folder: Folder
) -> None:
    assert "exact" not in terminal(read(methods_folder()))
    assert "exact" in terminal(read(compare_folder()))


def test_the_terminal_compares_exposure_with_fedit_and_with_no_other(methods_folder: Folder) -> None:
    said = [line for line in display.differences(read(methods_folder())) if "exposure" in line]
    assert len(said) == 1
    assert said[0].startswith("federated − FedIT: -1.")
    assert said[0].endswith("the interval excludes zero)")
