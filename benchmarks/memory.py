"""Does memory grow with the number of clients? Peaks of runs with ten and a thousand, and of server rounds.

    python -m benchmarks.memory --scale real

Both are `fedloom run quickstart`, each in its own process: ten clients per round, about seven examples each,
no answers. Clients outside the round cost only their examples' text. Passes are limited to 1,024 tokens, so
that both federations fill them: with larger passes the longest round would decide, and more examples have a
longer one.

The server's round is one of FedAvg over 512 clients beside one over 64, which fill its window: letters
packed, answers opened, judged and folded, over an adapter of 1M values. Keeping the whole cohort would take
448 adapters more, 1.8 GB. glibc is told to return large blocks: by default its heap fragments, to twice the
size from about 500 clients on, but no further.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks import contest
from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.federation import Federation
from fedloom.messages import Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.server_end import ServerEnd

ALLOWED = 1.10  # times the peak of the small federation


def settings(clients: int, rounds: int) -> list[str]:
    return [
        f"rounds={rounds}",
        f"data.clients={clients}",
        f"data.examples={7 * clients + 32}",  # 4 of each of 8 categories are held out; of 7,040 per seed
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
    """Peak resident memory in MB of a process that runs nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        return _peak("--one", str(clients), str(rounds), f"{folder}/run")


def _peak(*what: str, **environment: str) -> float:
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *what],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if said.returncode:
        raise RuntimeError(f"{' '.join(what)} ended with {said.returncode}:\n{said.stderr[-2000:]}")
    return float(said.stdout.split()[-1])


def one(clients: int, rounds: int, folder: Path) -> None:
    from fedloom.experiment.commands import run
    from fedloom.experiment.toml import load

    run(load("quickstart", settings(clients, rounds)), folder)
    print(resident())


class Echo:
    """A channel to clients that all send the same delta."""

    def __init__(self, delta: AdapterState):
        self.delta = delta

    def call(self, method: str, payloads: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for client in payloads:
            assert payloads[client]
            yield client, wire.pack_update(Update(client, {"delta": self.delta}, 1.0))


def server(cohort: int, values: int) -> None:
    adapter = AdapterState({"a": torch.zeros(values)})
    transport = ServerEnd(Echo(AdapterState({"a": torch.full((values,), 1e-3)})), FedAvg().expects)
    clients = [f"client-{i:03d}" for i in range(cohort)]
    Federation(FedAvg(), transport, lambda _: clients).run(ServerState(adapter), 1)
    print(resident())


def resident() -> float:
    """Peak memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(*, scale: str, repeats: int) -> dict[str, object]:
    many, rounds, values = (1000, 20, 1 << 20) if scale == "real" else (40, 1, 1 << 14)
    few = [peak_of(10, rounds) for _ in range(repeats)]
    lots = [peak_of(many, rounds) for _ in range(repeats)]
    return {
        "id": "memory",
        "scale": scale,
        "rounds": rounds,
        "clients": [10, many],
        "peak_mb": [few, lots],
        "ratio": min(lots) / min(few),
        "server_mb": [
            _peak("--server", str(cohort), str(values), MALLOC_MMAP_THRESHOLD_="131072")
            for cohort in (64, 512)
        ],
        "allowed": ALLOWED,
        "machine": contest.machine(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        return
    if sys.argv[1:2] == ["--server"]:
        server(int(sys.argv[2]), int(sys.argv[3]))
        return
    given = contest.arguments(__doc__).parse_args()
    found = measure(scale=given.scale, repeats=given.repeats)
    print(
        f"memory, {found['scale']}: peak MB {found['peak_mb']} for {found['clients']} clients,"
        f" ratio {found['ratio']:.3f}, goal at most {ALLOWED};"
        f" the server's round over 64 and 512 clients: {found['server_mb']}"
    )
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
