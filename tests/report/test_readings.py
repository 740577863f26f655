"""The terminal and the page say the same of an audit, always beside the control."""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom.cli.audit import _table
from fedloom.report import page, readings
from fedloom.storage.files import AUDIT

Folder = Callable[..., Path]
Audit = dict[str, Any]
SCORES = ("loss", "reference", "zlib", "min_k", "min_k_plus")


def drawn(audited: Audit, seed: int) -> Audit:
    """Another audit of the same form: other figures, and here and there a reason in their place."""
    rng = random.Random(seed)
    found = deepcopy(audited)
    public, server = found["positions"]["public"], found["positions"]["server"]

    def interval(value: float) -> list[float]:
        return sorted((value - rng.random() * 0.3, value + rng.random() * 0.3))

    def share() -> dict[str, Any] | None:
        value = rng.random() ** 3
        return (
            None
            if rng.random() < 0.15
            else {
                "hits": round(40 * value),
                "of": 40,
                "value": round(40 * value) / 40,
                "ci95": interval(value),
            }
        )

    def separation() -> dict[str, Any]:
        auc = rng.random()
        return {
            "auc": auc,
            "auc_ci95": interval(auc),
            "at": [{"target": 0.01, "tpr": share() or {"value": 0.0, "ci95": [0.0, 0.1]}}],
        }

    for row in ("released", "base"):
        for group in ("members", "held_out"):
            public["discoverable"][row][group]["extractable"] = [
                {"n": n, "p": 0.5, "share": share()} for n in (1, 100)
            ]
        public["ranking"][row]["all"] = share()
        public["membership"][row] = {score: separation() for score in SCORES}
    if rng.random() < 0.5:
        public["greedy"] = {row: {"members": share(), "held_out": share()} for row in ("released", "base")}
    gain = rng.uniform(-0.3, 0.5)
    public["extraction"]["released"]["memorised"] = {"mean": gain, "ci95": rng.choice([None, interval(gain)])}
    if rng.random() < 0.3:
        public["exposure"] = {"reason": "no canaries were planted"}
    extracted = found["positions"]["client"]["cross_client"]
    for row in ("released", "base"):
        extracted[row] = {"client-000": {"coverage": share(), "decoys": share()}}
    for view in (server, server["aggregated"]):
        recall = rng.random()
        view["inversion"] = rng.choice(
            [
                {"reason": "the update fills its space"},
                {
                    "recall": recall,
                    "chance": rng.random() / 3,
                    "chance_sd": 0.02,
                    "tokens": 90,
                    "ci95": interval(recall),
                    "held_out": share(),
                },
            ]
        )
        view["membership"] = rng.choice([{"reason": "the client holds nothing but secrets"}, separation()])
    if rng.random() < 0.2:
        found["positions"]["server"] = {"reason": "one round is missing"}
    client = {
        "examples": 8,
        "mean": rng.random(),
        "held_out": rng.random(),
        "max": 1.0,
        "near": {"hits": 1},
        "secrets": share(),
    }
    found["synthesis"] = rng.choice(
        [{"reason": "no client keeps synthetic examples"}, {"clients": {"c": client}}]
    )
    found["one_run"] = rng.choice([{"reason": "none"}, {"epsilon": rng.random(), "correct": 3, "guesses": 4}])
    return found


def on_the_terminal(audited: Audit) -> str:
    console = Console(width=400)
    with console.capture() as said:
        console.print(_table(audited["name"], readings.lines(audited)))
    return said.get()


def on_the_page(folder: Path, audited: Audit) -> str:
    (folder / AUDIT).write_text(json.dumps(audited))
    written = page.write(folder).read_text()
    section = written[written.index('id="audit"') :]
    return html.unescape(re.sub(r"\s*<[^>]+>\s*", "\t", section[: section.index("</section>")]))


@pytest.mark.parametrize("seed", range(25))
def test_the_terminal_and_the_page_say_the_same(run_folder: Folder, audited: Audit, seed: int) -> None:
    found = drawn(audited, seed)
    terminal = [[cell.strip() for cell in row.split("│")] for row in on_the_terminal(found).splitlines()]
    shown = on_the_page(run_folder(), found)
    for lines in readings.lines(found).values():
        for line in lines:
            words = [line.measure, line.found, line.control, line.interval, line.reading]
            assert ["", *words, ""] in terminal
            assert re.search(r"[ \t]*".join(map(re.escape, filter(None, words))), shown), words
            shown = shown.replace(line.measure, "", 1)  # each line has its own row


@pytest.mark.parametrize("seed", range(25))
def test_every_figure_stands_beside_a_control_or_an_interval_and_no_reading_is_clear_without_one(
    audited: Audit, seed: int
) -> None:
    for lines in readings.lines(drawn(audited, seed)).values():
        for line in lines:
            assert line.control or line.found == "–", line
            assert not line.clear or line.reading, line


def tokens(audited: Audit, **got: Any) -> readings.Line:
    server = audited["positions"]["server"]
    server["inversion"] = {
        "recall": 0.5,
        "chance": 0.02,
        "chance_sd": 0.01,
        "tokens": 90,
        "ci95": [0.4, 0.6],
        "held_out": None,
        **got,
    }
    return next(
        line
        for line in readings.lines(audited)["The server"]
        if line.measure.startswith("From its upload: client-000's")
    )


@pytest.mark.parametrize(
    ("held_out", "reading"),
    [
        ({"value": 0.05, "ci95": [0.0, 0.2]}, "its own can be told"),
        ({"value": 0.45, "ci95": [0.3, 0.6]}, "hardly more than any such text"),
        (None, "above chance, with nothing held out to compare"),
    ],
)
def test_tokens_far_above_chance_are_compared_with_those_of_held_out_texts(
    audited: Audit, held_out: Any, reading: str
) -> None:
    line = tokens(audited, held_out=held_out)
    assert (line.reading, line.clear) == (reading, reading == "its own can be told")
    assert "held out" in line.control


def test_tokens_within_chance_are_called_so(audited: Audit) -> None:
    assert tokens(audited, recall=0.03, ci95=[0.0, 0.06]).reading == "within chance"


def test_a_score_that_is_upside_down_tells_members_too(audited: Audit) -> None:
    membership = audited["positions"]["public"]["membership"]
    membership["released"]["loss"] = {
        "auc": 0.1,
        "auc_ci95": [0.05, 0.2],
        "at": membership["released"]["loss"]["at"],
    }
    [line] = [
        line
        for line in readings.lines(audited)["Anyone with the adapter"]
        if line.measure.startswith("Membership")
    ]
    assert (line.measure, line.reading, line.clear) == (
        "Membership: AUC by loss",
        "tells members from others, inverted",
        True,
    )


def test_secrets_that_decoys_match_are_luck(audited: Audit) -> None:
    some = {"hits": 2, "of": 6, "value": 1 / 3, "ci95": [0.1, 0.7]}
    extracted = audited["positions"]["client"]["cross_client"]
    none = {"hits": 0, "of": 6, "value": 0.0, "ci95": [0.0, 0.4]}
    extracted["base"] = {"client-000": {"coverage": none, "decoys": none}}
    for decoys, reading in ((some, "no more than by luck"), (none, "secrets of others come out")):
        extracted["released"] = {"client-000": {"coverage": some, "decoys": decoys}}
        assert readings.lines(audited)["Another client"][0].reading == reading


def sentence(**line: Any) -> str:
    [told] = readings.gate(
        {"gate": [{"measure": "auc", "limit": 0.65, "records": 40, "needed": None, "on": "bound", **line}]}
    )
    assert told.passed is line["passed"]
    return told.text.removeprefix(
        "AUC of the best membership attack, beyond what the base tells apart, at most 0.65: "
    )


def test_the_gate_says_what_was_found_what_may_be_and_how_many_records_would_do() -> None:
    assert (
        sentence(value=0.55, bound=0.62, passed=True)
        == "found 0.550, up to 0.620 by the 95% interval of 40 records of either kind: kept."
    )
    assert sentence(value=0.7, bound=0.8, passed=False).endswith("of 40 records of either kind: exceeded.")
    few = sentence(value=0.6, bound=0.8, passed=False, needed=160)
    assert few.endswith(
        "of either kind: too few to tell, so it counts as failed. Such a figure needs about 160."
    )
    assert "too near the limit" in sentence(value=0.65, bound=0.8, passed=False)
    assert sentence(value=0.6, bound=0.8, passed=True, on="estimate").endswith("kept by the estimate alone.")
    assert (
        sentence(value=None, passed=False, reason="no upload")
        == "not measured (no upload), so it counts as failed."
    )
