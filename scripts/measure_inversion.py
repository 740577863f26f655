"""How many of a client's tokens can the server read off one upload? By rank, number of tokens, and optimizer.

    python scripts/measure_inversion.py

One client with four examples of T different tokens, drawn at random; the second round of FedAvg on the
embedded base, so that B is no longer zero. Recall among the T tokens ranked first, mean over seeds; a random
ranking finds T / 4096.
"""

from __future__ import annotations

from statistics import fmean
from typing import Annotated

import torch
import typer

from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks.inversion import FirstInputs, TokenRanking, invert, layer_inputs, recall
from fedloom.attacks.view import upload
from fedloom.client import Client
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.models import load_base
from fedloom.messages import Broadcast
from fedloom.rng import numpy_stream
from fedloom.state import AdapterState
from fedloom.steps import LocalTraining, LoraSpec, Tokens

VOCABULARY = 4096
LOCAL = {
    "SGD, 1 step": LocalTraining(batch_size=4, learning_rate=0.1, optimizer="sgd", clip=1.0),
    "AdamW, 10 steps": LocalTraining(batch_size=4, epochs=10, learning_rate=4e-3),
}


def examples(distinct: int, count: int, seed: int) -> tuple[list[int], list[Tokens]]:
    """`count` sequences over this many different tokens, each of which occurs."""
    rng = numpy_stream(seed, "inversion", distinct)
    tokens = (5 + rng.choice(VOCABULARY - 10, size=distinct, replace=False)).tolist()
    length = max(16, 2 * distinct // count)
    text = [t for _ in range(-(-count * length // distinct)) for t in rng.permutation(tokens).tolist()]
    labelled = (False,) + (True,) * (length - 1)
    return tokens, [Tokens(tuple(text[i * length : (i + 1) * length]), labelled) for i in range(count)]


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3, guesses: Annotated[int, typer.Option(min=0)] = 64
) -> None:
    torch.set_num_threads(1)
    print(f"{'':28s}" + "".join(f"  T={t:<4d}" for t in (8, 16, 32, 64)))
    for rank in (8, 16):
        for name, local in LOCAL.items():
            model, _ = load_base("embedded")
            engine = LoraEngine.build(model, lambda t: t, lora=LoraSpec(rank=rank, alpha=2.0 * rank))
            start = engine.initial_adapter(0)
            warm = (
                start
                + upload(
                    FedAvg(),
                    Broadcast(0, {"adapter": start}),
                    Client("warm", examples(400, 20, 99)[1], local=local),
                    engine,
                ).delta
            )
            inputs = layer_inputs(engine.model, start)
            assert isinstance(inputs, FirstInputs)
            cells = [
                fmean(_recall(engine, local, warm, inputs, distinct, seed, guesses) for seed in range(seeds))
                for distinct in (8, 16, 32, 64)
            ]
            print(f"rank {rank:<3d} {name:<19s}" + "".join(f"  {cell:<6.2f}" for cell in cells), flush=True)


def _recall(
    engine: LoraEngine,
    local: LocalTraining,
    start: AdapterState,
    inputs: FirstInputs,
    distinct: int,
    seed: int,
    guesses: int,
) -> float:
    tokens, own = examples(distinct, 4, seed)
    view = upload(
        FedAvg(), Broadcast(1, {"adapter": start}), Client(f"client-{seed}", own, local=local), engine
    )
    ranking = invert(view, inputs, guesses=guesses)
    return recall(ranking, tokens).recall if isinstance(ranking, TokenRanking) else 0.0


if __name__ == "__main__":
    typer.run(main)
