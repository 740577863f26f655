"""B10: FlexLoRA's server step for a 7B model on one core, beside decomposing the whole sum.

    python -m benchmarks.aggregation --scale real

Five clients of rank 8 on the four attention maps of 32 layers: 128 sums of 4096 x 4096, none of which the
server forms. Here the whole sum is formed for one target, its singular value decomposition taken, and the two
results compared; its time is reported for that target.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import torch

from benchmarks import contest
from benchmarks.contest import Stopwatch
from fedloom.algorithms.products import mean_product
from fedloom.state import AdapterState

CLOSE = 1e-4  # relative to the norm: the whole sum is decomposed in float32


@dataclass(frozen=True)
class Size:
    targets: int
    width: int
    clients: int = 5
    rank: int = 8


SIZES = {"tiny": Size(targets=2, width=64), "real": Size(targets=128, width=4096)}


def adapter(size: Size, seed: int) -> AdapterState:
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for target in range(size.targets):
        found[f"base_model.model.{target}.lora_A.weight"] = torch.randn(
            size.rank, size.width, generator=stream
        )
        found[f"base_model.model.{target}.lora_B.weight"] = torch.randn(
            size.width, size.rank, generator=stream
        )
    return AdapterState(found)


def measure(*, scale: str, repeats: int) -> dict[str, object]:
    size = SIZES[scale]
    parts = [(1 / size.clients, adapter(size, seed)) for seed in range(size.clients)]
    first = [f"base_model.model.0.lora_{side}.weight" for side in "BA"]

    def whole() -> torch.Tensor:
        total = sum((p * (state[first[0]] @ state[first[1]]) for p, state in parts), start=torch.zeros(()))
        u, s, v = torch.linalg.svd(total)
        return (u[:, : size.rank] * s[: size.rank]) @ v[: size.rank]

    with contest.threads(1):
        dense = Stopwatch()
        with dense.running():
            expected = whole()
        watches = []
        for _ in range(repeats):
            watches.append(Stopwatch())
            with watches[-1].running():
                ours = mean_product(parts)
    off = float((ours[first[0]] @ ours[first[1]] - expected).norm() / expected.norm())
    contest.must_be("the product of the new factors, relative", off, CLOSE)
    return {
        "id": "B10",
        "scale": scale,
        "difference": off,
        "targets": size.targets,
        "cpu": [w.cpu for w in watches],
        "whole sum, one target": dense.cpu,
        "machine": contest.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SIZES, default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = measure(scale=given.scale, repeats=given.repeats)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
