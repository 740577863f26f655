"""Clocks, peaks and tables: how contestants are timed, and how their figures are reported.

There are two clocks. Processor time of one thread counts computation, and neighbours on shared cores affect
it little; wall time of two threads is the time a user waits. Contestants take turns, so that a slow minute
hits all of them. The smallest of the repeats is compared; the median and the spread are shown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedloom.state import AdapterState

EXACT = 1e-11  # largest difference of a value, in float64, on a small copy
CLOSE = 2e-2  # float32: norm of the difference over the norm of the learnt change; Adam's first steps
# are signs, so a gradient near zero that rounds to the other side moves a value by the whole rate
SPENT_AT_LEAST = 0.05  # seconds spent looking for a peak


class Stopwatch:
    """Processor and wall seconds of everything inside `running()`."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the machine's peak -------------------------------------------------------------------------------------


def peak(dtype: torch.dtype, *, size: int = 1024, device: str = "cpu") -> float:
    """FLOP/s of square matrix products, measured now, by the fastest library that really computes in `dtype`.

    On one thread, by processor time; on a GPU by wall time, with all of it.
    """
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw).to(device, dtype) for _ in range(2))
    best = 0.0
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "medium") if dtype == torch.float32 and device == "cpu" else ("highest",):
        torch.set_float32_matmul_precision(precision)
        try:
            if precision == "medium" and not _computes_in_float32():
                continue
            best = max(best, *(_rate(a, b) for _ in range(5)))
        finally:
            torch.set_float32_matmul_precision(before)
    return best


def _rate(a: torch.Tensor, b: torch.Tensor) -> float:
    on_gpu = a.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    a @ b
    if on_gpu:
        torch.cuda.synchronize()
    start, count = clock(), 0
    while clock() - start < SPENT_AT_LEAST:
        for _ in range(20 if on_gpu else 1):
            a @ b
            count += 1
        if on_gpu:
            torch.cuda.synchronize()
    return 2.0 * a.shape[0] ** 3 * count / (clock() - start)


def _computes_in_float32() -> bool:
    """Whether float32 products really are: under "medium", some processors compute them in bfloat16."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm()) < 1e-5


def computes_in_bfloat16() -> bool:
    """Whether bfloat16 is native; otherwise it is emulated and many times slower than float32."""
    if torch.cuda.is_available():
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("fedloom", "torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


# --- results ------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one contestant, repeat by repeat."""

    cpu: list[float] = field(default_factory=list)  # of one thread
    wall: list[float] = field(default_factory=list)  # with two threads, if requested


@dataclass
class Row:
    """One contestant."""

    name: str
    times: Times
    tokens: int  # real tokens in the work
    padding: float  # share of the processed slots without one
    labelled: float  # share of the slots that count towards the loss
    useful: float = 0.0  # FLOP needed by the work
    peak: float = 0.0  # FLOP/s of this machine in the contestant's dtype

    @property
    def seconds(self) -> float:
        return min(self.times.cpu)


@dataclass
class Report:
    """One benchmark, finished."""

    id: str
    title: str
    scale: str
    rows: list[Row]  # the peer first
    equality: Mapping[str, Any]
    workload: dict[str, Any]
    goals: Mapping[str, str] = field(default_factory=dict)  # contestant -> target ratio
    notes: list[str] = field(default_factory=list)

    def ratio(self, row: Row) -> float:
        return self.rows[0].seconds / row.seconds


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


HEADER = (
    "contestant",
    "CPU s, 1 thread",
    "wall s, 2 threads",
    "us/token",
    "times faster",
    "goal",
    "padding",
    "labelled",
    "GFLOP/s",
    "of peak",
)


def cells(report: Report) -> list[list[str]]:
    table = []
    for row in report.rows:
        rate = row.useful / row.seconds
        table.append(
            [
                row.name,
                spread(row.times.cpu),
                spread(row.times.wall),
                f"{1e6 * row.seconds / max(row.tokens, 1):.0f}",
                f"{report.ratio(row):.1f}",
                report.goals.get(row.name, ""),
                f"{row.padding:.0%}",
                f"{row.labelled:.0%}",
                f"{rate / 1e9:.1f}" if row.useful else "-",
                f"{rate / row.peak:.0%}" if row.useful and row.peak else "-",
            ]
        )
    return table


def printed(report: Report) -> str:
    table = [list(HEADER), *cells(report)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    lines = [
        f"{report.id}{'' if report.scale == 'real' else ', a tiny copy'}: {report.title}",
        f"  equal: {_pairs(report.equality)}",
    ]
    lines += [f"  work: {_pairs(report.workload)}"]
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines + [f"  {note}" for note in report.notes])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def save(report: Report, path: Path) -> None:
    """As JSON: the report, the machine, and the command that made it."""
    command = "python -m " + " ".join([_module(), *_shown(sys.argv[1:])])
    known = {**asdict(report), "machine": machine(), "command": command}
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def _module() -> str:
    """The command `benchmarks.training`, however it was started."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def _shown(words: Sequence[str]) -> list[str]:
    """The word without the folders of the person who ran it."""
    return [f"<{Path(word).name}>" if "/" in word else word for word in words]


# --- equality -----------------------------------------------------------------------------------------------


def largest_difference(one: AdapterState, other: AdapterState) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def relative_difference(one: AdapterState, other: AdapterState, start: AdapterState) -> float:
    """Norm of the difference over the norm of `other`'s change since `start`."""
    as_double = [state.to(torch.float64) for state in (one, other, start)]
    return (as_double[0] - as_double[1]).norm() / (as_double[1] - as_double[2]).norm()


def must_be(what: str, value: float, bound: float) -> float:
    """`value`, if it is within `bound`; unequal results must not be timed."""
    if not value <= bound:
        raise AssertionError(
            f"{what} differ by {value:.2e}, more than {bound:.0e}: this is not the same work"
        )
    return value


# --- the command line ---------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wall", action="store_true", help="also with two threads, by the wall clock")
    parser.add_argument("--out", type=Path, help="a folder for <benchmark>.json")
    return parser


def finish(report: Report, out: Path | None) -> None:
    print(printed(report), flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save(report, out / f"{report.id}.json")


def take_turns(
    contestants: Mapping[str, Callable[[], Stopwatch]], *, repeats: int, wall: bool
) -> dict[str, Times]:
    """Run every contestant once, then every one again. With `wall`, a second series with two threads."""
    times = {name: Times() for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            with threads(1):
                times[name].cpu.append(run().cpu)
        for name, run in contestants.items() if wall else ():
            with threads(2):
                times[name].wall.append(run().wall)
    return times
