"""The Python API on one page: `fedloom describe`, `run`, `compare` and `chat` as functions.

    python examples/02_python_api.py runs/python-api

Settings can follow as on the command line, for a shorter run for example: rounds=2 compare.seeds=2
"""

from __future__ import annotations

import sys
from pathlib import Path

import fedloom
from fedloom.experiment.datasets import load_data


def main(folder: Path, overrides: list[str]) -> None:
    # An experiment is a frozen tree of settings: a recipe or a file, with your changes.
    experiment = fedloom.load("quickstart", overrides)
    print(f"{experiment.name}: {experiment.rounds} rounds, adapter of rank {experiment.adapter.rank}")

    # Who holds what is a function of the settings and the seed.
    data = load_data(experiment)
    for client, examples in data.clients.items():
        print(f"  {client}: {len(examples)} examples, {', '.join(sorted({e.category for e in examples}))}")

    # `fedloom run`: train, evaluate, export. After an interruption, continue with resume=True.
    summary = fedloom.run(experiment, folder / "run")
    for row in summary["rows"]:
        print(f"  {row['row']}: {row['metric']} {row['mean']:.3f}")

    # `fedloom chat`: the tuned model answers, piece by piece. With base=True the untuned one would.
    model = fedloom.chat(folder / "run")
    for question in data.test[:3]:
        pieces = model.answer(question.instruction, question.context, max_new_tokens=32)
        print(f"  {question.instruction} -> {''.join(piece.text for piece in pieces)}")

    # `fedloom compare`: the four rows of FedIT's table, over several seeds.
    summary = fedloom.compare(experiment, folder / "compare")
    for difference in summary["differences"]:
        if (difference["a"], difference["b"]) == ("federated", "local best"):
            low, high = difference["ci95"]
            print(f"  federated - local best, {difference['metric']}: {low:+.3f} to {high:+.3f} (95%)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
