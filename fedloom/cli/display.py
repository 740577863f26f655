"""What a person sees at the end of a run: tables, and sentences about them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedloom.cli.console import counted, out, say, warn
from fedloom.report import endings, findings, terms, verdict
from fedloom.rows import Row
from fedloom.storage.files import ADAPTER, REPORT

TITLES = {
    "rule": "rule ↑",
    "rouge_l": "ROUGE-L ↑",
    "exact": "exact ↑",
    "ended": "ended ↑",
    "loss": "loss ↓",
    "exposure": "exposure ↓\nbits",
    "extraction": "extraction ↓\nROUGE-L",
    "auc": "membership\nAUC → 0.5",
}
DROPPED_FIRST = (
    "auc",
    "exact",
    "ended",
    "rouge_l",
    "extraction",
    "loss",
    "exposure",
    "rule",
)  # where a terminal is narrow
ORDER = ("rule", "rouge_l", "exact", "ended", "loss")
BESIDE_LEAKAGE = 2  # metrics of quality that a terminal has room for where leakage is shown, too


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The result table, what its differences show, who gains by taking part, and where everything lies."""
    out.print(results_table(summary, out.width))
    for line in endings.notes(summary):
        warn(line)
    for line in [*differences(summary), *verdict.taking_part(summary)]:
        say(line)
    if cut := summary.get("prompts_cut"):
        say(prompts_cut(cut))
    say(f"Report:  {folder / REPORT}")
    say(f"Adapter: {folder / ADAPTER}  (try: fedloom chat {shlex.quote(str(folder))})")


def prompts_cut(count: int) -> str:
    """What to know about answers whose question the model saw a part of."""
    questions = "1 question was" if count == 1 else f"{count} questions were"
    return f"{questions} answered on a cut prompt: the base model reads no more. A smaller evaluation.max_new_tokens leaves more to it."


def results_table(summary: Mapping[str, Any], width: int) -> Table:
    """Every named row, and as many metrics as fit into `width`; a method's best clients are left to the page."""
    leaks = findings.leaks(summary)
    quality = [m for m in findings.metrics(summary) if m in ORDER and m != "ended"]
    shown = [
        *(quality[:BESIDE_LEAKAGE] if leaks else quality),
        *(["ended"] if endings.shown(summary) else []),
        *leaks,
    ]
    table = _results_table(summary, shown)
    while len(shown) > 2 and out.measure(table, options=out.options.update(width=1000)).maximum > width:
        shown.remove(next(m for m in DROPPED_FIRST if m in shown))
        table = _results_table(summary, shown)
    return table


def _results_table(summary: Mapping[str, Any], shown: Sequence[str]) -> Table:
    seeds = len(findings.seeds(summary))
    table = Table(
        title=f"{summary['name']}: held-out examples, {counted(seeds, 'seed')}"
        + (", mean ± 95% interval" if seeds > 1 else ""),
        title_justify="left",
    )
    table.add_column("row", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for metric in shown:
        table.add_column(TITLES[metric], justify="right", no_wrap=True)
    own = findings.own(summary)
    for name in _named(summary) or findings.single_clients(summary):
        entries = [findings.entry(summary, name, m) for m in shown]
        cells = [
            "-"
            if e is None
            else f"{terms.value(e['metric'], e['mean'])} {terms.half_width(e['metric'], e['ci95'])}".strip()
            for e in entries
        ]
        title = f"federated ({own})" if name == "federated" else name
        table.add_row(title, Row.parse(name).of, *cells, style="bold" if name == "federated" else "")
    return table


def _named(summary: Mapping[str, Any]) -> list[str]:
    """Without the best clients of methods, which are chosen with hindsight."""
    labels = findings.methods(summary)
    rows = [(name, Row.parse(name)) for name in findings.rows(summary)]
    return [name for name, row in rows if not (row.statistic == "best" and row.label in labels)]


def differences(summary: Mapping[str, Any]) -> list[str]:
    """One plain sentence for each comparison of the federated row, in the first metric there is; in exposure with FedIT."""
    metric = findings.main_metric(summary)
    fedit = [label for label, its in findings.methods(summary).items() if its["name"] == "fedavg"]
    wanted = {(row, metric) for row in _named(summary)} | {
        (row, leak) for row in fedit for leak in findings.leaks(summary)[:1]
    }
    lines = []
    for d in summary["differences"]:
        other = d["a"] if d["b"] == "federated" else d["b"]
        if d["ci95"] is None or "federated" not in (d["a"], d["b"]) or (other, d["metric"]) not in wanted:
            continue
        low, high = d["ci95"]
        clear = f"the interval {'excludes' if findings.excludes_zero(d['ci95']) else 'includes'} zero"
        unit = {"exposure": "bits of exposure", "auc": "of the AUC's distance from 0.5"}.get(
            d["metric"], d["metric"]
        )
        if d.get("constant"):
            lines.append(
                f"{d['a']} − {d['b']}: {d['mean']:+.3f} {unit} in every seed, so that there is no interval"
            )
            continue
        lines.append(
            f"{d['a']} − {d['b']}: {d['mean']:+.3f} {unit} (95% interval {low:+.3f} to {high:+.3f}; {clear})"
        )
    return lines


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    metrics: Sequence[str] = [m for m in ORDER if all(m in found for found in rows.values())]
    if all(found.get("ended", 1.0) >= endings.FEW for found in rows.values()):
        metrics = [m for m in metrics if m != "ended"]
    table = Table()
    table.add_column("row")
    for metric in metrics:
        table.add_column(TITLES[metric], justify="right")
    for name, found in rows.items():
        table.add_row(name, *(terms.value(m, found[m]) for m in metrics))
    return table
