"""report.html: all results of a run or a comparison, in one page that fetches nothing.

The page's content security policy names its scripts by their hashes and allows no connection, so
neither a text in the data nor a library can load or send anything. Without scripts the figures are
missing, but every number is still there in tables.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedloom.errors import RunError
from fedloom.evaluation.metrics import LEAKS, LOWER
from fedloom.report import (
    audit,
    bundle,
    endings,
    findings,
    judged,
    leakage,
    pictures,
    rounds,
    synthesis,
    tables,
    terms,
    verdict,
)
from fedloom.report.pictures import Journals
from fedloom.rows import Row
from fedloom.storage import durable, files, folders, journal
from fedloom.storage.files import METRICS, REPORT, SCHEMA, SUMMARY, read_judged, read_summary

NEEDED = (
    "kind",
    "name",
    "experiment",
    "rows",
    "differences",
    "groups",
    "samples",
    "rounds",
    "adapter_sha256",
    "partition",
    "data",
    "engine",
    "environment",
)
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}; "
    "base-uri 'none'; form-action 'none'"
)

Summary = Mapping[str, Any]


def write(folder: Path) -> Path:
    """Make `folder`/report.html from its summary and journals. Raises: RunError."""
    summary = _summary(folder)
    page = folder / REPORT
    durable.write(
        page, render(summary, _journals(folder, summary), audit.read(folder), read_judged(folder)).encode()
    )
    return page


def write_partition(partition: Mapping[str, Any], file: Path) -> Path:
    """Write a preview page that shows only who holds what. Raises: RunError."""
    page = _page(
        "partition.html.j2",
        shown={p.key: p for p in pictures.partition(partition)},
        clients=len(partition["clients"]),
        distance=partition["distance"],
        by=partition["by"],
    )
    durable.write(file, page.encode())
    return file


def render(
    summary: Summary,
    journals: Journals,
    audited: Mapping[str, Any] | None = None,
    judgements: Sequence[Mapping[str, Any]] = (),
) -> str:
    metric = findings.main_metric(summary)
    seeds, names = findings.seeds(summary), findings.rows(summary)
    records = pictures.federated(journals)
    told = {} if audited is None else audit.pictures(audited)
    generated, own = summary.get("synthesis", {}), findings.own(summary)
    leaking = leakage.pictures(summary, journals)
    return _page(
        "page.html.j2",
        s=summary,
        names=names,
        verdict=[*verdict.verdict(summary), *endings.notes(summary)],
        tiles=tables.tiles(summary),
        seeds=seeds,
        metric=metric,
        metrics=findings.metrics(summary),
        results=tables.table(summary, names),
        singles=tables.table(summary, findings.single_clients(summary), mark_best=False),
        hindsight=any(Row.parse(name).statistic == "best" for name in names),
        curves={f"leak_{m}": terms.metric_title(m) for m in LEAKS if f"leak_{m}" in leaking},
        made=[synthesis.tally(label, own, found) for label, found in generated.items()],
        audit=None if audited is None else audit.shown(audited, summary["adapter_sha256"]),
        swept=len(leakage.private_shares(summary)) > 1,
        attacked=findings.leaks(summary),
        differences=tables.differences(summary),
        shown={**pictures.pictures(summary, journals), **leaking, **synthesis.pictures(summary), **told},
        participation=rounds.took_part([c["client"] for c in summary["partition"]["clients"]], records),
        samples=[tables.sample(s, summary, metric) for s in summary["samples"]],
        toml=tomli_w.dumps(summary["experiment"]),
        facts=tables.facts(summary),
        command=tables.command(summary),
        glossary=[m for key, m in terms.METRICS.items() if key in findings.metrics(summary)],
        own=own,
        labels=list(findings.methods(summary)),
        lower=LOWER,
        arrow=terms.arrow,
        metric_title=terms.metric_title,
        mixes=tables.own_mix(summary),
        judgements=[judged.shown(table, own) for table in judgements],
    )


# --- reading the folder ----------------------------------------------------------------------------------


def _summary(folder: Path) -> Summary:
    path = folder / SUMMARY
    again = folders.resume(folder)
    try:
        summary = read_summary(folder)
    except (ValueError, OSError) as damage:
        raise RunError(
            f"{path} cannot be read: {type(damage).__name__}. The rounds it was made from are kept apart, "
            f"so delete it and have it made again: {again}"
        ) from damage
    if summary is None:
        raise RunError(f"{folder} has no {SUMMARY}, so it is no finished run. Finish it first: {again}")
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else None
        raise RunError(
            f"{path}: expected schema {SCHEMA}, found {found!r}. "
            "Use the version of fedloom that wrote it, or run the experiment again."
        )
    missing = [key for key in NEEDED if key not in summary] or ([] if summary["rows"] else ["rows"])
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}. Delete it and have it made again: {again}")
    return summary


def _journals(folder: Path, summary: Summary) -> Journals:
    """Whatever records can be read: a page without curves is better than none."""
    if summary["kind"] == "compare":
        places = {row: row for row in ("federated", *findings.methods(summary), "centralised", "local_only")}
        places |= {label: files.method(label) for label in findings.methods(summary)}
        found = {
            row: [
                journal.read(folder / files.seed(seed) / place / METRICS) for seed in findings.seeds(summary)
            ]
            for row, place in places.items()
        }
    else:
        row = "federated" if "federated" in findings.rows(summary) else "local_only"
        found = {row: [journal.read(folder / METRICS)]}
    kept = {row: [records for records in seeds if records] for row, seeds in found.items()}
    return {row: seeds for row, seeds in kept.items() if seeds}


# --- putting it together ---------------------------------------------------------------------------------


def _page(template: str, **values: Any) -> str:
    """A page with its style, its scripts and a policy that admits no others."""
    boot = _text("page.js")
    scripts = f"{bundle.admitted()} {_hash(boot)}"
    return (
        _environment()
        .get_template(template)
        .render(
            styles=_text("page.css"),
            boot=boot,
            packed=base64.b64encode(bundle.compressed()).decode(),
            policy=POLICY.format(scripts=scripts),
            **values,
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fedloom.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (resources.files("fedloom.report") / name).read_text("utf-8").replace("\r\n", "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
