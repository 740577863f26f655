"""The Python API in one page: what `fedloom describe`, `run`, `compare` and `chat` do, as functions.

    python examples/02_python_api.py runs/python-api

Any settings of the command line can follow, for a shorter run say: rounds=2 compare.seeds=2
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedloom.evaluation.answers import answers_of
from fedloom.evaluation.cache import Cache
from fedloom.experiment.commands import adapter_of, compare, run
from fedloom.experiment.datasets import load_data
from fedloom.experiment.machine import load_machine
from fedloom.experiment.toml import load


def main(folder: Path, overrides: list[str]) -> None:
    # An experiment is a frozen tree of settings: a recipe or a file, and what you change of it.
    experiment = load("quickstart", overrides)
    print(f"{experiment.name}: {experiment.rounds} rounds, adapter of rank {experiment.adapter.rank}")

    # Who holds what is a function of the settings and the seed.
    data = load_data(experiment)
    for client, examples in data.clients.items():
        print(f"  {client}: {len(examples)} examples, {', '.join(sorted({e.category for e in examples}))}")

    # `fedloom run`: train, evaluate, export. Interrupted, it goes on with resume=True.
    summary = run(experiment, folder / "run")
    for row in summary["rows"]:
        print(f"  {row['row']}: {row['metric']} {row['mean']:.3f}")

    # The tuned model answers. adapter=None would be the untuned base model.
    machine = load_machine(experiment)
    adapter = adapter_of(folder / "run", machine)
    questions = data.test[:3]
    said = answers_of(
        machine.engine,
        machine.template,
        questions,
        {"tuned": adapter},
        weights=machine.base_hash,
        max_new_tokens=32,
        cache=Cache(),
    )
    for question, answer in zip(questions, said["tuned"], strict=True):
        print(f"  {question.instruction} -> {answer.text}")

    # `fedloom compare`: the four rows of FedIT's table, over several seeds.
    summary = compare(experiment, folder / "compare")
    for difference in summary["differences"]:
        if (difference["a"], difference["b"]) == ("federated", "local best"):
            low, high = difference["ci95"]
            print(f"  federated - local best, {difference['metric']}: {low:+.3f} to {high:+.3f} (95%)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
