"""All benchmarks that need no GPU, each in a process of its own, and the table of docs/benchmarks.md.

    python -m benchmarks                                    # small copies of everything: does it work?
    python -m benchmarks --scale real --wall --shepherd PATH --openfedllm PATH --record
    python -m benchmarks --only B4 B5 --scale real --record

With `--record` the results of real runs go to docs/benchmarks.json, and the table in docs/benchmarks.md is
rebuilt from that file; benchmarks that were not run keep their rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import contest, generation, training

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs/benchmarks.md", ROOT / "docs/benchmarks.json"
BEGIN, END = "<!-- begin: results -->\n", "<!-- end: results -->\n"
TITLES = {id: benchmark.title for id, benchmark in training.BENCHMARKS.items()} | {
    "B6": "a FedPIT round: 5 clients, 8 prompts of 48 new tokens each, two adapters",
    "memory": "peak memory with 1,000 clients, as a multiple of that with 10",
    "B7": "7B shape on one GPU: a round of FedIT",
    "B8": "7B shape on one GPU: generation of a FedPIT round",
}
GOALS: dict[str, Mapping[str, str]] = {
    id: benchmark.goals for id, benchmark in training.BENCHMARKS.items()
} | {
    "B6": generation.GOALS,
    "memory": {"peak": "at most 1.10"},
    "B7": {"time": "8 s"},
    "B8": {"rate": "6,000 tokens/s"},
}
COLUMNS = (
    "",
    "measures",
    "contestant",
    "CPU s",
    "wall s, 2 threads",
    "times faster",
    "goal",
    "padding",
    "labelled",
    "of peak",
)


def table(record: Mapping[str, Any]) -> str:
    """A Markdown table, one line per contestant; a row without measurements says so."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for id, title in TITLES.items():
        goal = " / ".join(GOALS[id].values())
        if id not in record:
            lines.append(_line([id, title, "not yet measured", "", "", "", goal, "", "", ""]))
        elif id == "memory":
            found = record[id]
            few, many = (f"{contest.spread(mb)} MB" for mb in found["peak_mb"])
            lines.append(
                _line([id, title, f"{few}; {many}", "", "", f"{found['ratio']:.3f}", goal, "", "", ""])
            )
        elif id in ("B7", "B8"):
            lines.append(_line([id, title, _told(record[id]), "", "", "", goal, "", "", ""]))
        else:
            lines += _contestants(id, title, record[id])
    return "\n".join(lines) + "\n"


def _contestants(id: str, title: str, found: Mapping[str, Any]) -> list[str]:
    first, lines = min(found["rows"][0]["times"]["cpu"]), []
    for place, row in enumerate(found["rows"]):
        taken = min(row["times"]["cpu"])
        share = f"{row['useful'] / taken / row['peak']:.0%}" if row["useful"] and row["peak"] else ""
        lines.append(
            _line(
                [
                    "" if place else id,
                    "" if place else title,
                    row["name"],
                    contest.spread(row["times"]["cpu"]),
                    contest.spread(row["times"]["wall"]),
                    f"{first / taken:.1f}",
                    GOALS[id].get(row["name"], ""),
                    f"{row['padding']:.0%}",
                    f"{row['labelled']:.0%}",
                    share,
                ]
            )
        )
    return lines


def _told(figures: Mapping[str, Any]) -> str:
    """The results of gpu.py, in words."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            value = f"{value['us_per_token']:.0f} us/token"
        elif name.startswith("goal"):
            continue
        else:
            value = f"{value:.0f} tokens/s"
        parts.append(f"{name} {value}")
    return "; ".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_table(page: str, record: Mapping[str, Any]) -> str:
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + table(record) + END + tail


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}


def write(found: Mapping[str, Any]) -> None:
    record = recorded() | dict(found)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), record), "utf-8")


def main() -> None:
    parser = contest.arguments(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ID",
        choices=[*training.BENCHMARKS, "B6", "memory", "B7", "B8", "B9", "B10"],
    )
    parser.add_argument("--record", action="store_true", help="write docs/benchmarks.json and the table")
    training.add_clones(parser)
    given = parser.parse_args()
    chosen = given.only or [
        *training.BENCHMARKS,
        "B6",
        "memory",
        *(["B9", "B10"] if given.scale == "real" else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        common = [
            "--scale",
            given.scale,
            "--repeats",
            str(given.repeats),
            "--out",
            str(out),
            *(["--wall"] if given.wall else []),
        ]
        clones = [
            word
            for name, path in training.clones_of(given).items()
            for word in (f"--{name.lower()}", str(path))
        ]
        failed = []
        for id in chosen:
            if id in training.BENCHMARKS:
                words = ["benchmarks.training", id, *common, *clones]
            elif id == "B9":
                words = ["benchmarks.codec"]  # prints its own table
            elif id == "B10":
                words = [
                    "benchmarks.aggregation",
                    "--scale",
                    given.scale,
                    "--repeats",
                    str(given.repeats),
                ]  # prints too
            else:
                words = [
                    {"B6": "benchmarks.generation", "memory": "benchmarks.memory"}.get(id, "benchmarks.gpu"),
                    *common,
                ]
            if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
                failed.append(id)
        found = {path.stem: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}
        found |= {
            id: {**figures[id]} for figures in [found.pop("gpu", {})] for id in ("B7", "B8") if id in figures
        }
        if given.record and given.scale == "real":
            write({id: value for id, value in found.items() if id in TITLES and id in chosen})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
