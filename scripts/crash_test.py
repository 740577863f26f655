"""Kill runs with SIGKILL at random instants, resume them, and compare the results with an undisturbed run's.

    python scripts/crash_test.py                      50 runs, each killed once: 50 of 50 must be identical
    python scripts/crash_test.py --runs 1 --kills 5   one run, killed five times on its way

Every run is a process of its own, forked from one that has already loaded the modules, so that instants fall
into the work and not into imports. Instants are drawn uniformly over slightly more than the undisturbed run's
time, and drawn again if the run had finished by then. The comparison covers the saved adapter, its sha256 in
summary.json, and every line of metrics.jsonl except its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"
)  # before torch reads them

import fedloom.cli.display
import fedloom.experiment.commands
from fedloom.cli.main import main as fedloom
from fedloom.experiment.toml import load

TINY = [
    "quickstart",
    "model.base=random:llama",
    "rounds=16",
    "adapter.rank=2",
    "data.examples=96",
    "data.clients=4",
    "data.hold_out=4",
    "local.epochs=1",
    "local.batch_size=4",
    "examples_per_round=8",
    "cohort.kind=uniform",
    "cohort.count=3",
    "evaluation.answers=0",
]
LONGER = 1.5  # how much longer than the undisturbed run one may take, on a busy machine


def start(folder: Path, experiment: Path) -> int:
    """Start `fedloom run`, resuming if there is something to resume; returns the process id."""
    what = "--resume" if (folder / "experiment.toml").exists() else str(experiment)
    if process := os.fork():
        return process
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["fedloom", "run", what, "--out", str(folder)]
    code = 1
    try:
        fedloom()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(folder: Path, experiment: Path) -> None:
    if code := exit_code(start(folder, experiment)):
        raise SystemExit(f"A run ended with exit code {code}:\n{folder.with_suffix('.log').read_text()}")


def phase(folder: Path) -> str:
    """The phase of the run in which the process died, judging by the files on disk."""
    rounds = json_lines(folder / "metrics.jsonl")
    if (folder / "summary.json").exists():
        return "after the summary"
    committed = sorted(folder.glob("state/round-*.json"))
    if not committed:
        return "before the first commit"
    last = int(committed[-1].stem.removeprefix("round-"))
    if last == rounds_of(folder):
        return "in finalisation"
    return f"after round {last}" + (", its line not written" if len(rounds) <= last else "")


def rounds_of(folder: Path) -> int:
    [line] = [
        line for line in (folder / "experiment.toml").read_text().splitlines() if line.startswith("rounds = ")
    ]
    return int(line.removeprefix("rounds = "))


def json_lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in whole]


def outcome(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return summary["adapter_sha256"], adapter, json_lines(folder / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "settings", nargs="*", default=TINY, help="the run's recipe and settings; default: a tiny one"
    )
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as scratch:
        fixed = Path(scratch) / "fixed.toml"  # the same for every run, even if a recipe is edited meanwhile
        fixed.write_text(load(asked.settings[0], asked.settings[1:]).to_toml(), "utf-8")
        undisturbed = Path(scratch) / "undisturbed"
        began = time.monotonic()
        finish(undisturbed, fixed)
        span = time.monotonic() - began
        expected = outcome(undisturbed)
        print(f"undisturbed: adapter {expected[0][:16]}, {span:.1f} s", flush=True)
        identical, phases = 0, Counter[str]()
        for run in range(1, asked.runs + 1):
            folder = Path(scratch) / f"run-{run}"
            died: list[str] = []
            while len(died) < asked.kills:
                instant = chance.uniform(0, LONGER * span)
                process = start(folder, fixed)
                time.sleep(instant)
                os.kill(process, signal.SIGKILL)
                if exit_code(process) != -signal.SIGKILL:  # it had finished: draw again
                    folder = folder.with_name(f"{folder.name}-again")
                    died = []
                    continue
                died.append(f"{instant:.2f} s, {phase(folder)}")
                phases[phase(folder).partition(",")[0]] += 1
            finish(folder, fixed)
            same = outcome(folder) == expected
            identical += same
            print(
                f"run {run}: killed at {'; '.join(died)}: {'identical' if same else 'DIFFERENT'}", flush=True
            )
        print(f"{identical} of {asked.runs} identical (seed {asked.seed}, {time.monotonic() - began:.0f} s)")
        print("kills: " + ", ".join(f"{count} {where}" for where, count in sorted(phases.items())))
    sys.exit(identical != asked.runs)


if __name__ == "__main__":
    main()
