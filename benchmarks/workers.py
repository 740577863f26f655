"""Wall time, processor time and memory of one and of two worker processes, on the same groups of clients.

    python -m benchmarks.workers B4 B5 quickstart

Both take turns, so that a slow minute hits them alike; the adapters must be bit-identical. Needs Linux
(/proc) and two cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import workload
from benchmarks.training import BENCHMARKS, tokens_of
from fedloom.engine.fork_server import ForkServer
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.loading import Setup
from fedloom.engine.models import skeleton
from fedloom.engine.pool import Pool
from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import load_skeleton
from fedloom.experiment.toml import load
from fedloom.steps import Fit, Fitted, Steps, drive_groups


@dataclass(frozen=True)
class Case:
    setup: Setup
    fits: Sequence[Fit]
    width: int  # clients in a group


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds of all processes
    busiest: float  # seconds of the process that computed most: the wall time if cores were idle
    pss: int  # bytes of all processes, shared memory counted once


def benchmark(name: str, folder: Path) -> Case:
    """A round of B4 or B5, in groups that two workers can share evenly."""
    setting = BENCHMARKS[name].setting
    spelling, encode = tokens_of(setting)
    workload.llama(setting.size).save_pretrained(folder)
    spelling.save_pretrained(folder)
    setup = Setup(str(folder), device="cpu", lora=setting.lora)
    start = AdapterLayout.of(skeleton(str(folder))[0], setting.lora).initial(0)
    clients = workload.clients(setting.clients, setting.samples)[: setting.per_round]
    fits = [
        Fit(start, [encode(e) for e in own], setting.local, 0, (str(i),)) for i, own in enumerate(clients)
    ]
    return Case(setup, fits, -(-len(fits) // 4) if len(fits) > 8 else 1)


def quickstart() -> Case:
    """A round of the recipe, in two groups of four clients."""
    experiment = load("quickstart")
    base, data = load_skeleton(experiment), load_data(experiment)
    start = AdapterLayout.of(base.model, experiment.adapter).initial(0)
    setup = Setup("embedded", device="cpu", lora=experiment.adapter, end=base.template.end)
    local = experiment.local.at(0)
    fits = [
        Fit(start, [base.template.encode(e) for e in own], local, 0, (c, "local"))
        for c, own in data.clients.items()
    ]
    return Case(setup, fits, 4)


def asked(fit: Fit) -> Steps[Fitted]:
    return (yield fit)


def trained(case: Case, pool: Pool) -> list[str]:
    fits = list(enumerate(case.fits))
    parts = [fits[i : i + case.width] for i in range(0, len(fits), case.width)]
    groups: Iterator[Mapping[str, Steps[Fitted]]] = (
        {str(i): asked(fit) for i, fit in part} for part in parts
    )
    return [fitted.adapter.sha256() for _, fitted in drive_groups(groups, pool)]


def processes() -> list[int]:
    """This process, the fork servers and their workers."""
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in task.joinpath("children").read_text().split()]
    return found


def cpu() -> dict[int, float]:
    ticks = {
        pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in processes()
    }
    return {pid: sum(map(int, both)) / os.sysconf("SC_CLK_TCK") for pid, both in ticks.items()}


def pss() -> int:
    lines = [
        line for pid in processes() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    ]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measured(case: Case, repeats: int) -> dict[int, list[Cost]]:
    costs: dict[int, list[Cost]] = {1: [], 2: []}
    seen: set[tuple[str, ...]] = set()
    for _ in range(repeats):
        for workers, mine in costs.items():
            with Pool(ForkServer(case.setup, threads=1), workers, encode=lambda example: example) as pool:
                trained(case, pool)  # a warm-up, so that nothing happens for the first time
                busy, clock = cpu(), time.monotonic()
                seen.add(tuple(trained(case, pool)))
                wall = time.monotonic() - clock
                spent = [seconds - busy.get(pid, 0.0) for pid, seconds in cpu().items()]
                mine.append(Cost(wall, sum(spent), max(spent), pss()))
    assert len(seen) == 1, "adapters differ"
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", default=["B4", "B5", "quickstart"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for name in given.which:
        with TemporaryDirectory() as folder:
            case = quickstart() if name == "quickstart" else benchmark(name, Path(folder))
            costs = measured(case, given.repeats)
        one, two = (_medians(costs[workers]) for workers in (1, 2))
        print(
            f"{name}: {len(case.fits)} clients in groups of {case.width}; wall {one.wall:.2f} -> {two.wall:.2f} s "
            f"({one.wall / two.wall:.2f} times faster), CPU {one.cpu:.2f} -> {two.cpu:.2f} s, "
            f"of the busiest process {one.busiest:.2f} -> {two.busiest:.2f} s ({one.busiest / two.busiest:.2f} times), "
            f"memory {one.pss / 1e6:.0f} -> {two.pss / 1e6:.0f} MB ({two.pss / one.pss:.2f} times)",
            flush=True,
        )


def _medians(costs: Sequence[Cost]) -> Cost:
    return Cost(*(median(getattr(c, field) for c in costs) for field in ("wall", "cpu", "busiest", "pss")))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
