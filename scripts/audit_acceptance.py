"""Make a federation learn secrets by heart, without any defence, and see whether the audit says so.

    python scripts/audit_acceptance.py path/to/stories260K

Four clients with 25 stories each, told by the base model itself, and 16 canaries of 24 random words; FedAvg of
LoRA factors of rank 32 on all linear maps, one local epoch of Adam in each of 64 rounds. 64 canaries in, 64
out, 2048 references. Expected in the end: nearly all of 11 bits of exposure, and members told from others at
every threshold. Looked at every 16 rounds, since canaries are exposed long before one comes back word for
word. Exits with 1 where the audit sees less.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"
)  # before torch reads them

from fedloom.attacks import discoverable
from fedloom.attacks.release import Limits, best_auc, gate
from fedloom.attacks.targets import Targets
from fedloom.data.example import Example
from fedloom.data.partition import partition_table
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.positions import lower_bound, of_public
from fedloom.experiment.settings import Experiment
from fedloom.experiment.simulation import federated
from fedloom.experiment.toml import parse
from fedloom.experiment.training import Training
from fedloom.rng import numpy_stream
from fedloom.state import AdapterState
from fedloom.steps import Generate
from fedloom.storage import checkpoint

CLIENTS, STORIES, CANARIES, WORDS = 4, 25, 16, 24
LOOK = 16  # rounds
VERBATIM = 16  # tokens of a canary that are to come back exactly
EXPOSURE, AUC, EPSILON = 10.0, 0.98, 1.5  # what an audit has to find


def settings(base: Path, rounds: int) -> Experiment:
    return parse(
        "",
        "acceptance",
        [
            "name=acceptance",
            f"rounds={rounds}",
            f"model.base={base}",
            "machine.device=cpu",
            "prompt.format=plain",
            "adapter.rank=32",
            "adapter.alpha=64.0",
            "local.batch_size=8",
            "local.learning_rate=5e-3",
            "cohort=all",
            f"evaluation.every={rounds}",
            "evaluation.answers=0",
            "evaluation.max_new_tokens=32",
            "audit.references=2048",
        ],
    )


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that are one token each, so that so many random words are so many random tokens."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [p[1:] for p in pieces if p.startswith("▁") and p[1:].isalpha()]
    return [w for w in words if len(tokenizer(f"a {w}", add_special_tokens=False).input_ids) == 2]


def secrets(words: Sequence[str], count: int, name: str) -> list[Example]:
    """Canaries of one law: planted, held out and references differ in nothing but their draws."""
    drawn = numpy_stream(0, "acceptance", name).integers(len(words), size=(count, WORDS)).tolist()
    return [
        Example("", " ".join(words[i] for i in row), category="canary", id=f"{name}:{n}", private=True)
        for n, row in enumerate(drawn)
    ]


def stories(machine: Machine, count: int) -> list[Example]:
    start = tuple(machine.template.document_ids(""))
    asked = Generate(
        [start] * count,
        max_new_tokens=96,
        stop=machine.template.stop,
        temperature=1.0,
        stream=("acceptance",),
    )
    texts = [machine.template.decode(ids) for ids in machine.engine.answer({0: asked})[0]]
    return [Example("", text, category="story", id=f"story:{n}") for n, text in enumerate(texts)]


def federation(machine: Machine) -> tuple[Dataset, Targets]:
    words, tales = vocabulary(machine.tokenizer), stories(machine, (CLIENTS + 1) * STORIES)
    planted = secrets(words, CLIENTS * CANARIES, "planted")
    clients = {
        f"client-{c}": tales[c * STORIES : (c + 1) * STORIES] + planted[c * CANARIES : (c + 1) * CANARIES]
        for c in range(CLIENTS)
    }
    pool = [e for own in clients.values() for e in own]
    size = STORIES + CANARIES
    parts = {c: list(range(i * size, (i + 1) * size)) for i, c in enumerate(clients)}
    data = Dataset(clients, tales[-STORIES:], partition_table(pool, parts, by="category"), "category")
    twins = secrets(words, len(planted), "held out")
    return data, Targets(planted, twins, dict.fromkeys(planted, 1), twins, secrets(words, 2048, "references"))


def figures(
    experiment: Experiment, data: Dataset, machine: Machine, adapter: AdapterState, on: Targets
) -> dict[str, Any]:
    """Of the untuned base and of the adapter: what the acceptance is about, and the gate's word on it."""
    public = of_public(experiment, data, machine, adapter, on, samples=16, full=False)
    exact = discoverable.greedy(
        machine.engine, machine.template, {"released": adapter}, on.members, on.held_out, shortest=VERBATIM
    )
    best, _ = best_auc(public["membership"])
    rows = {}
    for row in ("base", "released"):
        known = public["exposure"][row]["loss" if row == "base" else "calibrated"]
        told = public["membership"][row][best]
        said = exact[row].members
        assert said is not None
        rows[row] = {
            "exposure in": known["planted"]["mean"],
            "exposure out": known["held_out"]["mean"],
            "by": best,
            "AUC": told["auc"],
            "TPR at no FPR": told["at"][1]["tpr"]["value"],
            f"{VERBATIM}-token exact": f"{said.hits}/{said.of}",
            "ROUGE-L in": public["extraction"][row]["members"]["rouge_l"]["mean"],
            "ROUGE-L out": public["extraction"][row]["held_out"]["rouge_l"]["mean"],
        }
    found = {"positions": {"public": public, "server": {"reason": "not part of this"}}}
    return {
        "rows": rows,
        "epsilon": lower_bound(public)["epsilon"],
        "gate": gate(found, Limits(exposure=2.0, auc=0.65)),
    }


def misses(found: dict[str, Any]) -> list[str]:
    """What the audit should have seen and has not."""
    row = found["rows"]["released"]
    wanted = [
        ("exposure in", row["exposure in"], EXPOSURE),
        ("AUC", row["AUC"], AUC),
        ("epsilon", found["epsilon"], EPSILON),
    ]
    said = [
        f"{name}: expected at least {least}, got {value:.3f}"
        for name, value, least in wanted
        if value < least
    ]
    return said + (["the gate let it pass"] if found["gate"]["passed"] else [])


def shown(found: dict[str, Any], row: str) -> str:
    values = found["rows"][row].items()
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:.3f}'}" for name, value in values
    )


@dataclass(frozen=True)
class Looks(Listener):
    """Attacks the adapter that was committed last, every few rounds; keeps what it found last."""

    training: Training
    measure: Callable[[AdapterState], dict[str, Any]]
    rounds: int
    found: list[dict[str, Any]] = field(default_factory=list)

    def committed(self, record: Mapping[str, Any]) -> None:
        if record["round"] % LOOK and record["round"] != self.rounds:
            return
        state, its = self.training.folder / "state", self.training.fingerprint
        last = checkpoint.newest(state, fingerprint=its).checkpoint
        assert last is not None  # it was committed just now
        self.found.append(self.measure(last.state.adapter))
        if len(self.found) == 1:
            print(f"base: {shown(self.found[0], 'base')}", flush=True)
        print(
            f"round {record['round']}: {shown(self.found[-1], 'released')}, epsilon {self.found[-1]['epsilon']:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="the folder of stories260K")
    parser.add_argument("--rounds", type=int, default=64)
    given = parser.parse_args()
    began = time.monotonic()
    experiment = settings(given.base, given.rounds)
    machine = load_machine(experiment)
    data, on = federation(machine)
    with tempfile.TemporaryDirectory() as folder:
        simulated = federated(experiment, data, machine, Path(folder))
        measure = partial(figures, experiment, data, machine, on=on)
        looks = Looks(simulated.training, measure, experiment.rounds)
        simulated.finish(looks)
    print(f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} of them computing")
    for line in looks.found[-1]["gate"]["gate"]:
        print(
            f"gate: {line['measure']} {line['value']:.3f}, limit {line['limit']:g}: {'passed' if line['passed'] else 'failed'}"
        )
    missed = misses(looks.found[-1])
    print("\n".join(missed) or "The audit sees it all.")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
