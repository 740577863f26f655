"""B1 to B5: rounds of federated tuning, by fedloom and by a peer, on the same batches.

    python -m benchmarks.training B1 --scale real --shepherd ../FederatedGPT-Shepherd

Without a clone of the peer, "HF Trainer per client" stands in (hf_trainer.py). First both do a small copy of
the work in float64, and the averaged adapters must agree to 1e-11. Then the work itself is timed, and the
adapters of every repeat are compared again, in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import contest, hf_trainer, openfedllm, peers, rounds, shepherd, workload
from benchmarks.contest import Report, Row, Stopwatch
from benchmarks.rounds import Outcome, Setting
from benchmarks.workload import Encode, Example
from fedloom.engine.layout import AdapterLayout
from fedloom.state import AdapterState

FP32, BF16 = "fedloom", "fedloom, bfloat16"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Data = Sequence[Sequence[Example]]
Peer = Callable[[Any, Setting, AdapterState, Data], Outcome]  # model, setting, start, data


@dataclass(frozen=True)
class Benchmark:
    title: str
    peer: str  # whose work this is
    setting: Setting
    goals: dict[str, str]  # times faster; in brackets, the stretch goal

    @property
    def small(self) -> Setting:
        """Two clients with seven examples and two optimizer steps each: everything that can go wrong, fast."""
        cut = {"size": "tiny", "clients": 3, "samples": 7, "per_round": 2, "batch": 4}
        micro = 4 if self.setting.micro_batch == self.setting.batch else 2
        return replace(self.setting, **cut, micro_batch=micro, steps=2 if self.setting.steps else None)  # type: ignore[arg-type]


B1 = Setting(size="15M", clients=20, samples=60, per_round=5, batch=32, micro_batch=8, targets=ATTENTION)
BENCHMARKS = {
    "B1": Benchmark(
        "15M model, 5 of 20 clients with about 60 examples, batch 32 in micro-batches of 8, loss on all tokens",
        shepherd.NAME,
        B1,
        {FP32: "6.5 (7.5)", BF16: "10 (13)"},
    ),
    "B2": Benchmark(
        "B1 with batches of like length (group_by_length)",
        shepherd.NAME,
        replace(B1, group_by_length=True),
        {FP32: "3.2 (3.8)", BF16: "5.2 (6.5)"},
    ),
    "B3": Benchmark(
        "15M model, 5 of 20 clients, 4 steps of 16, loss on responses, gradient checkpointing as it sets it",
        openfedllm.NAME,
        Setting(
            size="15M",
            clients=20,
            samples=60,
            per_round=5,
            batch=16,
            micro_batch=16,
            steps=4,
            targets=("q_proj", "v_proj"),
            response_only=True,
            checkpointing=True,
        ),
        {FP32: "12 (15)", BF16: "18 (24)"},
    ),
    "B4": Benchmark(
        "1M model, 20 of 100 clients with 8 examples each",
        shepherd.NAME,
        replace(B1, size="1M", clients=100, samples=8, per_round=20),
        {FP32: "7.4 (12)"},
    ),
    "B5": Benchmark(
        "1M model, three rounds of 5 of 20 clients with about 150 examples",
        shepherd.NAME,
        replace(B1, size="1M", samples=150, rounds=3),
        {FP32: "4.5 (7)"},
    ),
}


def tokens_of(setting: Setting) -> tuple[Any, Encode]:
    """The tokenizer, and the peer's way of turning examples into tokens with it."""
    tokenizer = workload.tokenizer()
    tokenizer.padding_side = "right" if setting.response_only else "left"
    encode = workload.openfedllm_tokens if setting.response_only else workload.shepherd_tokens
    return tokenizer, encode(tokenizer)


def contestant(benchmark: Benchmark, clones: dict[str, Path]) -> tuple[str, Peer]:
    """The peer's own program if its clone was named, else our baseline."""
    tokenizer, encode = tokens_of(benchmark.setting)
    clone = clones.get(benchmark.peer)
    if clone is None:

        def stand_in(model: Any, setting: Setting, start: AdapterState, data: Data) -> Outcome:
            return hf_trainer.run(model, setting, encode, start, data, tokenizer)

        return hf_trainer.NAME, stand_in
    module = shepherd if benchmark.peer == shepherd.NAME else openfedllm
    checked = peers.check(clone, module.COMMIT, module.URL)
    return module.NAME, lambda *args: module.run(checked, *args, tokenizer)


def start_of(setting: Setting, dtype: torch.dtype) -> AdapterState:
    return workload.later_adapter(AdapterLayout.of(workload.llama(setting.size), setting.lora), dtype)


def small_copy_differs(benchmark: Benchmark, peer: Peer) -> float:
    """The largest difference between the averaged adapters' values, in float64. Raises if beyond rounding."""
    setting = benchmark.small
    _, encode = tokens_of(setting)
    data = workload.clients(setting.clients, setting.samples)
    start = start_of(setting, torch.float64)
    with workload.everything_in_double():
        theirs = peer(workload.llama(setting.size, torch.float64), setting, start, data)
        model = workload.llama(setting.size, torch.float64)
        ours = rounds.by_fedloom(model, setting, encode, start, theirs, data)
    off = contest.largest_difference(ours.adapter, theirs.adapter)
    return contest.must_be("the adapters of a small copy in float64", off, contest.EXACT)


def measure(
    id: str,
    *,
    scale: str = "tiny",
    repeats: int = 3,
    wall: bool = False,
    clones: dict[str, Path] | None = None,
) -> Report:
    benchmark = BENCHMARKS[id]
    name, peer = contestant(benchmark, clones or {})
    with contest.threads(1):
        exact = small_copy_differs(benchmark, peer)
    setting = benchmark.setting if scale == "real" else benchmark.small
    _, encode = tokens_of(setting)
    data = workload.clients(setting.clients, setting.samples)
    start = start_of(setting, torch.float32)
    latest: dict[str, Outcome] = {}
    off: dict[str, float] = {}

    def theirs() -> Stopwatch:
        latest[name] = peer(workload.llama(setting.size), setting, start, data)
        return latest[name].watch

    def ours(label: str, dtype: torch.dtype) -> Callable[[], Stopwatch]:
        def run() -> Stopwatch:
            model = workload.llama(setting.size, dtype)
            latest[label] = rounds.by_fedloom(model, setting, encode, start, latest[name], data)
            now = contest.relative_difference(latest[label].adapter, latest[name].adapter, start)
            off[label] = max(off.get(label, 0.0), now)
            if dtype == torch.float32:
                contest.must_be("what was learnt in float32", now, contest.CLOSE)
            return latest[label].watch

        return run

    dtypes = {FP32: torch.float32}
    if contest.computes_in_bfloat16():
        dtypes[BF16] = torch.bfloat16
    contestants = {name: theirs} | {label: ours(label, dtype) for label, dtype in dtypes.items()}
    times = contest.take_turns(contestants, repeats=repeats, wall=wall)
    with contest.threads(1):
        peaks = {label: contest.peak(dtypes.get(label, torch.float32)) for label in contestants}
    work = latest[name].work
    useful = workload.flops(workload.llama(setting.size), tokens=work.tokens, head_rows=work.labelled)
    rows = [
        Row(
            label,
            times[label],
            work.tokens,
            latest[label].work.padding,
            latest[label].work.labelled_share,
            useful,
            peaks[label],
        )
        for label in contestants
    ]
    lengths = workload.lengths_of([encode(example) for examples in data for example in examples])
    return Report(
        id,
        benchmark.title,
        scale,
        rows,
        equality={"small copy in float64, largest difference": exact}
        | {f"{label}, relative difference": value for label, value in off.items()},
        workload={**lengths, "real tokens": work.tokens, "padded slots of the peer": work.slots},
        goals=benchmark.goals if scale == "real" else {},
        notes=[]
        if name == benchmark.peer
        else [f"{name} is ours and stands in for {benchmark.peer}: no clone was named."],
    )


def add_clones(parser: argparse.ArgumentParser) -> None:
    for module in (shepherd, openfedllm):
        parser.add_argument(
            f"--{module.NAME.lower()}",
            type=Path,
            metavar="PATH",
            help=f"a clone of {module.URL} at commit {module.COMMIT}",
        )


def clones_of(given: argparse.Namespace) -> dict[str, Path]:
    found = {module.NAME: getattr(given, module.NAME.lower()) for module in (shepherd, openfedllm)}
    return {name: path for name, path in found.items() if path is not None}


def main() -> None:
    parser = contest.arguments(__doc__)
    parser.add_argument("which", nargs="*", metavar="B1 ... B5", help="all, if none is named")
    add_clones(parser)
    given = parser.parse_args()
    if odd := set(given.which) - set(BENCHMARKS):
        parser.error(f"expected some of {', '.join(BENCHMARKS)}; got {', '.join(sorted(odd))}")
    for id in given.which or BENCHMARKS:
        report = measure(
            id, scale=given.scale, repeats=given.repeats, wall=given.wall, clones=clones_of(given)
        )
        contest.finish(report, given.out)


if __name__ == "__main__":
    main()
