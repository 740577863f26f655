"""Does memory grow with the number of clients? The peak of a run with a thousand against one with ten.

    python -m benchmarks.memory --scale real

Both are `fedloom run quickstart` in a process of its own: ten clients of a round, some seven examples each, no
answers. The clients that are not in a round cost their examples' text and nothing else. Passes are kept to 1,024
tokens, so that both federations fill them: with larger ones the longest round would decide, and among more
examples there is a longer one.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import contest

ALLOWED = 1.10  # times the peak of the small federation


def settings(clients: int, rounds: int) -> list[str]:
    return [
        f"rounds={rounds}",
        f"data.clients={clients}",
        f"data.examples={7 * clients + 32}",  # held out: 4 of each of 8 categories; the microworld has 7,040 for a seed
        'data.partition={kind="iid"}',
        "data.hold_out=4",
        "data.private_facts=0",
        'cohort={kind="uniform", count=10}',
        "examples_per_round=8",
        "machine.tokens_per_pass=1024",
        "evaluation.answers=0",
        f"evaluation.every={rounds}",
    ]


def peak_of(clients: int, rounds: int) -> float:
    """MB of resident memory at most, of a process that runs nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        said = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--one", str(clients), str(rounds), f"{folder}/run"],
            capture_output=True,
            text=True,
            check=False,
        )
    if said.returncode:
        raise RuntimeError(
            f"the run with {clients} clients ended with {said.returncode}:\n{said.stderr[-2000:]}"
        )
    return float(said.stdout.split()[-1])


def one(clients: int, rounds: int, folder: Path) -> None:
    from fedloom.experiment.commands import run
    from fedloom.experiment.toml import load

    run(load("quickstart", settings(clients, rounds)), folder)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kilobytes / (1e6 if sys.platform == "darwin" else 1e3))


def measure(*, scale: str, repeats: int) -> dict[str, object]:
    many, rounds = (1000, 20) if scale == "real" else (40, 1)
    few = [peak_of(10, rounds) for _ in range(repeats)]
    lots = [peak_of(many, rounds) for _ in range(repeats)]
    return {
        "id": "memory",
        "scale": scale,
        "rounds": rounds,
        "clients": [10, many],
        "peak_mb": [few, lots],
        "ratio": min(lots) / min(few),
        "allowed": ALLOWED,
        "machine": contest.machine(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        return
    given = contest.arguments(__doc__).parse_args()
    found = measure(scale=given.scale, repeats=given.repeats)
    print(
        f"memory, {found['scale']}: peak MB {found['peak_mb']} for {found['clients']} clients,"
        f" ratio {found['ratio']:.3f}, goal at most {ALLOWED}"
    )
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
