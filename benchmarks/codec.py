"""B9: how small a codec makes an 80 MB delta, and how long that takes on one core.

    python benchmarks/codec.py

The delta of an adapter for LLaMA-7B (rank 8 on all linear maps, 20 million values), filled with values that a
client of the quickstart learns in one round: blocks of 64 in random order and with random signs, so that zstd
finds no repetition. Then the same number of values from a normal distribution. Whole messages are measured,
packed and unpacked as they travel.

First the codecs' error bounds are asserted. Times are processor times, which neighbours on shared cores
affect little: the median and, in brackets, the smallest and largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"
)  # before torch reads them

import torch

from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import load_machine
from fedloom.experiment.toml import load
from fedloom.messages import Update
from fedloom.state import AdapterState
from fedloom.steps import Fit
from fedloom.transport import wire
from fedloom.transport.codec import Bf16, Codec, Fp32, Int4, Int8

SHAPES = {"self_attn": (4096, 4096), "mlp": (4096, 11008)}  # inputs and outputs
LINEARS = ["self_attn"] * 4 + ["mlp"] * 3
LAYERS, RANK = 32, 8
CODECS: list[
    tuple[str, Codec, float]
] = [  # and the largest error of a value, as a fraction of its block's largest value
    ("fp32", Fp32(), 0.0),
    ("bf16", Bf16(), 2**-8),
    ("int8", Int8(), 0.5 / 127),
    ("int8, no zstd", Int8(zstd=False), 0.5 / 127),
    ("int4", Int4(), 0.5 / 5),
    ("int4, block 128", Int4(block=128), 0.5 / 5),
    ("int4, 7 levels", Int4(levels=7), 0.5 / 7),
    ("int4, 7 levels, no zstd", Int4(levels=7, zstd=False), 0.5 / 7),
]


def learnt() -> torch.Tensor:
    """The values that one client of the quickstart learns in its first round, end to end."""
    experiment = load("quickstart")
    data, machine = load_data(experiment), load_machine(experiment)
    start, client = machine.engine.initial_adapter(experiment.seed), "client-000"
    job = Fit(start, data.clients[client], experiment.local.at(0), experiment.seed, (client, "local"))
    fitted = machine.engine.answer({client: job})[client]
    return torch.cat([t.flatten() for t in (fitted.adapter - start).values()])


def large(values: Callable[[int], torch.Tensor]) -> AdapterState:
    """The values in the shapes of the 7B adapter."""
    sizes = {
        f"{layer:02}.{i}.{ab}": n
        for layer in range(LAYERS)
        for i, kind in enumerate(LINEARS)
        for ab, n in zip("AB", (RANK * width for width in SHAPES[kind]), strict=True)
    }
    flat = values(sum(sizes.values()))
    parts = zip(sizes.items(), flat.split(list(sizes.values())), strict=True)
    return AdapterState({name: part.view(RANK, -1) for (name, _), part in parts})


def like(delta: torch.Tensor, n: int) -> torch.Tensor:
    draw, pieces = torch.Generator().manual_seed(0), delta[: len(delta) // 64 * 64].view(-1, 64)
    chosen = pieces[torch.randint(len(pieces), (n // 64 + 1,), generator=draw)].flatten()[:n]
    return chosen * (2 * torch.randint(2, (n,), generator=draw) - 1)


def check(codec: Codec, bound: float, sent: AdapterState, got: AdapterState) -> None:
    block = getattr(codec, "block", 1)
    for name, t in sent.items():
        rows, off = t.reshape(-1, block), (got[name] - t).reshape(-1, block).abs().amax(1)
        allowed = bound * (1 + 2**-16) * rows.abs().amax(1)
        assert bool((off <= allowed).all()), f"{codec.label}: {name} is off by more than half a step"


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, str]:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        taken.append(1e3 * (time.process_time() - start))
    return result, f"{statistics.median(taken):4.0f} ({min(taken):.0f}-{max(taken):.0f})"


def row(codec: Codec, bound: float, state: AdapterState, repeats: int) -> str:
    update = Update("client", {"delta": state}, 1.0)
    got = wire.unpack_update(wire.pack_update(update, codec), codec, state).delta
    check(codec, bound, state, got)
    error = (got - state).norm() / state.norm()
    data, encode = timed(lambda: wire.pack_update(update, codec), repeats)
    _, decode = timed(lambda: wire.unpack_update(data, codec, state), repeats)
    return f"{len(data) / 1e6:6.2f} {4 * state.numel() / len(data):7.2f}x  {encode:>16}  {decode:>16}  {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    own = learnt()
    for title, state in (
        ("learnt in a quickstart round", large(lambda n: like(own, n))),
        (
            "normally distributed",
            large(lambda n: 1e-3 * torch.randn(n, generator=torch.Generator().manual_seed(1))),
        ),
    ):
        print(f"\n{title}: {state.numel():,} values, {4 * state.numel() / 1e6:.1f} MB in float32")
        print(
            f"{'codec':24} {'MB':>6} {'smaller':>8}  {'encode, ms':>16}  {'decode, ms':>16}  relative L2 error"
        )
        for name, codec, bound in CODECS:
            print(f"{name:24} {row(codec, bound, state, repeats)}")


if __name__ == "__main__":
    main()
