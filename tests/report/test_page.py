from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from fedloom.errors import RunError
from fedloom.report import bundle, page
from fedloom.report.pictures import Picture

Folder = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements and texts of a page; scripts are kept apart, and unclosed elements are an error."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self) -> dict[str, Any]:
        """Key -> figure, as a browser reads it."""
        return {
            a["data-figure"] or "": json.loads(s)
            for a, s in zip(self.all("script"), self.scripts, strict=True)
            if "data-figure" in a
        }


def test_a_comparison_shows_every_section(compare_folder: Folder) -> None:
    seen = Page(page.write(compare_folder()))
    assert set(seen.figures) == {
        "rows",
        "groups",
        "clients",
        "held_out",
        "train",
        "partition",
        "participation",
        "bytes",
    }
    assert [a["id"] for a in seen.all("section")] == [
        "results",
        "learning",
        "data",
        "participation",
        "answers",
        "settings",
        "again",
        "words",
    ]


def test_a_page_loads_nothing(compare_folder: Folder) -> None:
    seen = Page(page.write(compare_folder()))
    assert not [a for _, a in seen.elements if {"src", "srcset", "data", "poster", "action"} & a.keys()]
    assert all((a["href"] or "").startswith("#") for _, a in seen.elements if "href" in a)
    assert "link" not in {tag for tag, _ in seen.elements}
    assert "@import" not in seen.text


def test_the_security_policy_admits_the_page_s_own_scripts_only(compare_folder: Folder) -> None:
    seen = Page(page.write(compare_folder()))
    policy = next(
        a["content"] or "" for a in seen.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    run = [s for a, s in zip(seen.all("script"), seen.scripts, strict=True) if "type" not in a]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in run}
    assert policy.startswith("default-src 'none'")
    allowed = re.search(r"script-src ([^;]*)", policy)
    assert allowed is not None
    assert set(allowed[1].split()) == hashes | {bundle.admitted()}


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&amp;"


def test_a_script_in_the_data_is_text(compare_folder: Folder) -> None:
    folder = compare_folder(instruction=HOSTILE, answer=HOSTILE, groups=(HOSTILE, "b", "c"))
    seen = Page(page.write(folder))
    assert "img" not in {tag for tag, _ in seen.elements}
    assert not any(
        "alert(" in s for a, s in zip(seen.all("script"), seen.scripts, strict=True) if "type" not in a
    )
    assert seen.text.count(HOSTILE) > 10


def test_no_text_in_a_figure_ends_its_script_element() -> None:
    assert "<" not in Picture("key", "label", go.Figure(layout={"title": {"text": HOSTILE}})).json


def test_a_name_in_the_data_is_no_markup_in_a_figure(compare_folder: Folder) -> None:
    names = [
        t["name"]
        for t in Page(page.write(compare_folder(groups=("<b>x</b>", "b", "c")))).figures["partition"]["data"]
    ]
    assert "&lt;b&gt;x&lt;/b&gt;" in names


def test_a_summary_s_name_is_quoted_in_the_command_to_repeat_it(run_folder: Folder) -> None:
    folder = run_folder()
    change(folder, name="a; rm -rf b")
    assert "fedloom run experiment.toml --out 'a; rm -rf b-again'" in Page(page.write(folder)).text


def test_one_seed_has_no_interval_anywhere(compare_folder: Folder) -> None:
    text = Page(page.write(compare_folder(seeds=1))).text
    assert "±" not in text
    assert "is better" not in text.replace("higher is better", "").replace("lower is better", "").replace(
        "stronger colour is better", ""
    )


def test_a_difference_within_chance_is_not_called_better(compare_folder: Folder) -> None:
    folder = compare_folder()
    differences = json.loads((folder / "summary.json").read_text())["differences"]
    change(folder, differences=[{**d, "ci95": [-1.0, 1.0]} for d in differences])
    seen = Page(page.write(folder))
    assert "Federated is better" not in seen.text
    assert "not distinguishable" in seen.text
    assert "clear" not in [a.get("class") for a in seen.all("td")]


def test_the_lower_loss_is_called_better(compare_folder: Folder) -> None:
    folder = compare_folder(metrics=(), seeds=2)
    change(
        folder,
        differences=[
            {
                "a": "federated",
                "b": "base",
                "metric": "loss",
                "mean": -0.5,
                "ci95": [-0.6, -0.4],
                "p_value": 0.0001,
            }
        ],
    )
    assert "Federated is better" in folder_text(folder)


def test_without_answers_the_page_is_about_the_loss(run_folder: Folder) -> None:
    folder = run_folder(metrics=())
    change(folder, samples=[])
    seen = Page(page.write(folder))
    assert "held-out loss of" in seen.text
    assert "answers" not in [a.get("id") for a in seen.all("section")]


def test_a_local_only_run_has_no_curve_of_a_shared_adapter(run_folder: Folder) -> None:
    shown = Page(page.write(run_folder(algorithm="local_only"))).figures
    assert "train" in shown
    assert "held_out" not in shown


def test_a_page_without_journals_is_still_a_page(compare_folder: Folder) -> None:
    folder = compare_folder(seeds=2)
    for lost in folder.glob("seed-*/*/metrics.jsonl"):
        lost.unlink()
    assert {"rows", "partition", "bytes"} <= set(Page(page.write(folder)).figures)


def test_a_hundred_clients_and_few_tuned_alone(compare_folder: Folder) -> None:
    seen = Page(
        page.write(
            compare_folder(clients=100, seeds=1, rounds=20, cohort=5, alone=5, metrics=("exact", "rouge_l"))
        )
    )
    assert len(seen.figures["clients"]["layout"]["yaxis"]["ticktext"]) == 5
    assert seen.figures["participation"]["layout"]["height"] <= 1000


def test_what_a_client_gets_is_weighted_by_its_own_mix(run_folder: Folder) -> None:
    folder = run_folder()
    partition = {
        "by": "category",
        "distance": 0.0,
        "totals": {"a": 1, "b": 3},
        "clients": [{"client": "c", "size": 4, "counts": {"a": 1, "b": 3}, "distance": 0.0}],
    }
    groups = {
        "base": {"a": {"rule": 0.0}, "b": {"rule": 0.0}},
        "federated": {"a": {"rule": 1.0}, "b": {"rule": 0.5}},
    }
    change(folder, partition=partition, groups=groups)
    federated = next(
        t for t in Page(page.write(folder)).figures["clients"]["data"] if t.get("name") == "Federated (FedIT)"
    )
    assert federated["x"] == [62.5]  # percent: (1 * 1.0 + 3 * 0.5) / 4


def test_an_answer_equal_to_the_reference_is_marked_and_no_other(run_folder: Folder) -> None:
    folder = run_folder()
    sample = {
        "group": "g",
        "instruction": "i",
        "context": "",
        "reference": "Two  Birds",
        "answers": {"base": "", "federated": "two birds"},
        "right": None,
    }
    change(folder, samples=[sample])
    text = folder_text(folder)
    assert text.count("✓ same as the reference") == 1
    assert "(empty answer)" in text


def test_where_a_rule_decides_its_verdict_is_marked_and_not_equality(run_folder: Folder) -> None:
    folder = run_folder()
    sample = {
        "group": "g",
        "instruction": "i",
        "context": "",
        "reference": "- owl",
        "answers": {"base": "- owl", "federated": "- crow"},
        "right": {"base": False, "federated": True},
    }
    change(folder, samples=[sample])
    text = folder_text(folder)
    assert text.count("✓ right") == 1
    assert "✓ same as the reference" not in text


def test_the_best_single_client_answers_beside_the_others(compare_folder: Folder) -> None:
    folder = compare_folder()
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        if row["row"] == "local:client-005" and row["metric"] == "rule":
            row["values"][0] = 0.99
    change(folder, rows=summary["rows"])
    assert "Best single client (client-005)" in folder_text(folder)


def test_every_figure_has_a_text_for_who_cannot_see_it(compare_folder: Folder) -> None:
    shown = [a for a in Page(page.write(compare_folder())).all("div") if a.get("role") == "img"]
    assert len(shown) == 8
    assert all(a["aria-label"] for a in shown)


def test_every_header_cell_says_what_it_heads(compare_folder: Folder) -> None:
    assert all(a.get("scope") in ("row", "col") for a in Page(page.write(compare_folder())).all("th"))


def test_the_page_ends_with_the_limits_of_its_privacy(run_folder: Folder) -> None:
    assert (
        "No differential privacy or secure aggregation was used in this run; adapters can leak training text."
        in folder_text(run_folder())
    )


def test_every_table_has_a_caption(compare_folder: Folder, audited: dict[str, Any]) -> None:
    folder = compare_folder()
    (folder / "audit.json").write_text(json.dumps(audited))
    seen = Page(page.write(folder))
    assert len(seen.all("caption")) == len(seen.all("table")) > 8


def test_the_gate_s_result_stands_at_the_top(compare_folder: Folder, audited: dict[str, Any]) -> None:
    folder = compare_folder()
    gate = [{"measure": "auc", "limit": 0.6, "value": 0.7, "passed": False}]
    (folder / "audit.json").write_text(json.dumps({**audited, "gate": gate, "passed": False}))
    assert "Release gate: failed." in Page(page.write(folder)).text.split("Every row is one way")[0]


def test_the_page_says_when_and_from_which_data_and_by_whom_only_if_told(run_folder: Folder) -> None:
    folder = run_folder()
    told = {
        "by": None,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T04:04:05+00:00",
        "source": "dolly",
        "files": ["dolly.jsonl"],
        "licence": "CC-BY-SA-3.0",
        "data_sha256": "c" * 64,
    }
    change(folder, provenance=told)
    text = folder_text(folder)
    assert "2026-01-02 03:04:05 UTC" in text
    assert "dolly: dolly.jsonl" in text
    assert "CC-BY-SA-3.0, as published" in text
    assert "c" * 64 in text
    assert "Run by" not in text
    change(folder, provenance={**told, "by": "A. Person"})
    assert "Run by" in folder_text(folder)


def test_a_summary_of_an_earlier_version_is_still_a_page(compare_folder: Folder) -> None:
    folder = compare_folder()
    path = folder / "summary.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("own_mix", "provenance")}
    path.write_text(json.dumps(old))
    assert "Taking part" not in folder_text(folder)


def test_who_gains_by_taking_part_is_on_the_page_with_every_seed(run_folder: Folder) -> None:
    folder = run_folder()
    clients = {c: {"shared": 0.5, "alone": 0.4, "outcome": "gain"} for c in ("a", "b")}
    seeds = [{"seed": s, "clients": clients} for s in (0, 1)]
    counts = {
        o: {"mean": n, "ci95": [n, n], "values": [n, n]} for o, n in (("gain", 2), ("tie", 0), ("lose", 0))
    }
    change(folder, own_mix={"rule": {"seeds": seeds, **counts}})
    text = folder_text(folder)
    assert "of 2 clients 2.0 (2.0 to 2.0) gain by taking part" in text
    assert "less than the weight of one answer is a tie" in text


def test_the_same_summary_gives_the_same_page(run_folder: Folder) -> None:
    folder = run_folder()
    assert page.write(folder).read_bytes() == page.write(folder).read_bytes()


def test_a_folder_without_a_summary_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no summary\.json.*--resume"):
        page.write(tmp_path)


@pytest.mark.parametrize(
    "damage", [b'{"schema": 1', b"\xff\xfe", b"[]", b"{}", b'{"schema": 99}', b'{"schema": 1, "rows": []}']
)
def test_a_damaged_summary_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(damage)
    with pytest.raises(RunError, match=r"summary\.json"):
        page.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def change(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def folder_text(folder: Path) -> str:
    return Page(page.write(folder)).text
