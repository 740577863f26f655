from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.experiment import simulation
from fedloom.experiment.toml import parse
from fedloom.report import findings, leakage, page
from fedloom.statistics import estimate
from fedloom.storage.files import method

Folder = Callable[..., Path]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def made(folder: Path) -> dict[str, Any]:
    summary = read(folder)
    return {k: p.figure for k, p in leakage.pictures(summary, page._journals(folder, summary)).items()}


def named(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.name}


def test_a_comparison_without_leakage_has_no_such_figure(
    methods_folder: Folder, compare_folder: Folder
) -> None:
    assert made(methods_folder(leakage=False)) == {}
    assert made(compare_folder(seeds=2)) == {}


def test_every_attacked_model_is_a_point_and_no_personal_one(methods_folder: Folder) -> None:
    assert set(named(made(methods_folder())["leaks"])) == {
        "Base model, untuned",
        "FedIT",
        "FedPIT v1",
        "Few 0.2, β = 0.2",
        "Federated (FewFedPIT), β = 0.6",
        "Centralised, pooled data",
    }


def test_a_point_lies_at_the_means_of_exposure_and_quality(methods_folder: Folder) -> None:
    folder = methods_folder()
    summary = read(folder)
    point = named(made(folder)["leaks"])["FedIT"]
    quality, exposure = (findings.entry(summary, "FedIT", m) for m in ("rule", "exposure"))
    assert quality is not None
    assert exposure is not None
    assert (point.x[0], point.y[0]) == (exposure["mean"], 100 * quality["mean"])
    assert point.error_x.array[0] == pytest.approx(exposure["ci95"][1] - exposure["mean"])
    assert point.error_y.array[0] == pytest.approx(100 * (quality["ci95"][1] - quality["mean"]))


def test_one_seed_has_points_without_bars_and_lines_without_bands(methods_folder: Folder) -> None:
    figures = made(methods_folder(seeds=1))
    assert all(trace.error_x.array is None for trace in named(figures["leaks"]).values())
    assert not any(trace.fill for trace in figures["leak_exposure"].data)


def test_the_points_of_a_sweep_are_joined_in_the_order_of_their_share(methods_folder: Folder) -> None:
    folder = methods_folder()
    line = next(t for t in made(folder)["leaks"].data if t.mode == "lines")
    found = [findings.entry(read(folder), row, "exposure") for row in ("Few 0.2", "federated")]  # 0.2, 0.6
    assert list(line.x) == [e["mean"] for e in found if e]


def test_a_single_share_is_no_sweep(methods_folder: Folder) -> None:
    folder = methods_folder()
    summary = read(folder)
    summary["experiment"]["compare"]["methods"]["Few 0.2"] = {"name": "fedavg"}
    assert not [t for t in leakage.trade_figure(summary, "rule", "exposure").data if t.mode == "lines"]


def test_leakage_by_round_is_drawn_for_every_method_whose_journal_has_it(methods_folder: Folder) -> None:
    figures = made(methods_folder())
    assert {"leak_exposure", "leak_extraction", "leak_auc"} <= set(figures)
    names = set(named(figures["leak_exposure"]))
    assert names - {n for n in names if n.startswith("base ")} == {
        "FedIT",
        "Few 0.2",
        "Federated (FewFedPIT)",
        "Centralised, pooled data",
    }


def test_the_base_is_a_level_and_no_point_of_a_curve(methods_folder: Folder) -> None:
    figure = made(methods_folder(rounds=4))["leak_exposure"]
    curve = named(figure)["FedIT"]
    assert list(curve.x) == [1, 2, 3, 4]
    base = next(t for t in figure.data if t.line.dash == "dash")
    assert base.y[0] == base.y[1] == pytest.approx(1.4, abs=0.1)


def test_a_band_is_the_interval_over_seeds() -> None:
    found = leakage.over_seeds([{0: 1.0, 1: 2.0}, {0: 1.0, 1: 4.0}, {1: 6.0}])
    assert list(found) == [1]  # the third seed has no round 0
    assert found[1] == estimate([2.0, 4.0, 6.0])


def test_rows_of_an_alias_are_in_the_sweep() -> None:
    methods = {"A": {"name": "ppfedit", "private_share": 0.3}, "B": {"name": "fedavg"}}
    own = {"name": "ppfedit", "private_share": 0.5}
    summary = {"experiment": {"algorithm": own, "compare": {"methods": methods}}}
    assert leakage.private_shares(summary) == {"federated": 0.5, "A": 0.3}


def test_a_page_looks_for_a_method_where_a_comparison_keeps_it() -> None:
    experiment = parse('[compare.methods]\n"Few 0.2" = "fedavg"\n"LocIT+SA" = "fedavg"', "x")
    kept = {label: folder for folder, (label, _) in simulation.trainings(experiment).items()}
    assert {label: method(label) for label in experiment.compare.methods} == {
        label: kept[label] for label in experiment.compare.methods
    }
