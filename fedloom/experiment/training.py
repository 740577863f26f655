"""A run in a folder: started, killed, resumed, finished; and what it leaves there.

experiment.toml   what was asked for, every default written out
inputs.json       what the data, the base model and the prompts were: a resumed run goes on with no others
metrics.jsonl     one line a round
state/            the last two committed rounds (checkpoint.py)
adapter/          the tuned adapter in PEFT's format, with a model card
summary.json      the result, machine readable
report.html       the same for people, in one page
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.algorithms.base import UNSENT, Algorithm, ServerState
from fedloom.client import Client
from fedloom.errors import RunError
from fedloom.evaluation.loss import held_out_loss
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.leakage import leakage
from fedloom.experiment.machine import Machine
from fedloom.experiment.observers import Listener
from fedloom.experiment.settings import Experiment
from fedloom.federation import Federation, Round
from fedloom.messages import ClientId
from fedloom.storage import checkpoint, durable, journal
from fedloom.storage.checkpoint import Checkpoint
from fedloom.transport.downlink import Downlink
from fedloom.transport.in_process import InProcess

INPUTS = "inputs.json"


@dataclass(frozen=True)
class Training:
    """One row of a comparison: an algorithm over some clients, in a folder of its own."""

    folder: Path
    experiment: Experiment
    dataset: Dataset
    machine: Machine
    algorithm: Algorithm
    clients: Mapping[ClientId, Client]
    select: Callable[[int], Sequence[ClientId]]
    fingerprint: str

    def finish(self, listener: Listener) -> ServerState:
        """Run to the last round, from the newest committed one if there is any.

        The result does not depend on where or how often the run was interrupted before.
        """
        state_folder, metrics = self.folder / "state", self.folder / "metrics.jsonl"
        # Before the journal is written, which syncs the folder that both lie in: else power loss could take `state` away.
        state_folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.newest(state_folder, fingerprint=self.fingerprint)
        for damage in found.damaged:
            listener.warned(f"not used, since it is damaged: {damage}; going on from the round before it")
        if found.checkpoint is None:
            durable.write(self.folder / INPUTS, json.dumps(self._inputs(), indent=1).encode())
            state = self.algorithm.init(self.machine.engine.initial_adapter())
            record: Mapping[str, Any] = self._record(state, Round(-1, ()), seconds=0.0)
            journal.align(metrics, None)
            self._commit(state, record)
        else:
            self._check_inputs()
            state, record = found.checkpoint.state, found.checkpoint.record
            for client, memory in found.checkpoint.memories.items():
                self.clients[client].memory = dict(memory)
            if lost := journal.align(metrics, record):
                listener.warned(
                    f"{metrics} was damaged and lacks round {', '.join(map(str, lost))}; the result is not affected"
                )
        sizes = [len(self.select(r)) for r in range(self.experiment.rounds)]
        listener.phase("training")
        listener.started(rounds=self.experiment.rounds, completed=state.round, cohort=fmean(sizes))
        clock = time.monotonic()

        def after_round(state: ServerState, seen: Round) -> None:
            nonlocal clock
            record = self._record(state, seen, seconds=time.monotonic() - clock)
            self._commit(transport.downlink.into(state), record)
            listener.committed(record)
            clock = time.monotonic()

        how = self.experiment.transport
        transport = InProcess(
            self.algorithm,
            self.machine.engine,
            self.clients,
            how.width,
            Downlink.of(state, how.codec.build()),
        )
        federation = Federation(self.algorithm, transport, self.select, after_round, listener.updated)
        return federation.run(state, self.experiment.rounds)

    def _inputs(self) -> dict[str, str]:
        machine = self.machine
        return {
            "data_sha256": self.dataset.sha256(),
            "base_sha256": machine.base_sha256,
            "prompt_sha256": machine.template.sha256(),
        }

    def _check_inputs(self) -> None:
        """Refuse to go on with other data or another base model than the run began with."""
        saved = self.folder / INPUTS
        try:
            odd = other_inputs(saved, self.dataset, self.machine)
        except (OSError, ValueError) as damaged:
            raise RunError(f"{saved} is missing or damaged; start again with another --out.") from damaged
        if odd:
            raise RunError(
                f"The {odd} not what this run began with ({saved}). Put the old back, or start a new run in another --out."
            )

    def _commit(self, state: ServerState, record: Mapping[str, Any]) -> None:
        memories = {c: client.memory for c, client in self.clients.items() if client.memory}
        checkpoint.commit(
            self.folder / "state", Checkpoint(state, memories, record), fingerprint=self.fingerprint
        )
        journal.append(self.folder / "metrics.jsonl", record)

    def _record(self, state: ServerState, seen: Round, *, seconds: float) -> dict[str, Any]:
        clients = {c: _numbers(u.metrics) for c, u in sorted(seen.updates.items())}
        weights = {
            c: u.weight for c, u in seen.updates.items() if math.isfinite(u.metrics.get("loss", math.nan))
        }
        loss = (
            sum(seen.updates[c].metrics["loss"] * w for c, w in weights.items()) / sum(weights.values())
            if weights
            else None
        )
        return {
            "round": state.round,
            "cohort": list(seen.cohort),
            "clients": {
                c: {"examples": u, **clients[c]}
                for c, u in sorted((c, x.weight) for c, x in seen.updates.items())
            },
            "unsent": {
                c: _numbers(self.clients[c].memory[UNSENT])
                for c in clients
                if UNSENT in self.clients[c].memory
            },
            "refused": dict(sorted(seen.refused.items())),
            "loss": loss,
            "bytes_up": seen.bytes_up,
            "bytes_down": seen.bytes_down,
            "tokens": int(sum(u.metrics.get("tokens", 0) for u in seen.updates.values())),
            "seconds": round(seconds, 3),
            "held_out": self._evaluate(state),
            "leakage": self._leakage(state),
            "adapter_sha256": state.adapter.sha256(),
        }

    def _evaluate(self, state: ServerState) -> dict[str, Any] | None:
        """Held-out loss of the server's adapter, every few rounds; None between, and where nobody shares one."""
        e = self.experiment.evaluation
        if state.round % e.every and state.round != self.experiment.rounds:
            return None
        test, groups = held_out_part(self.experiment, self.dataset)
        adapter = state.adapter if state.round else None
        found = held_out_loss(self.machine.engine, test, groups, {"global": adapter})["global"]
        mixes = {c: found.of_mix(self.dataset.mix(c)) for c in self.clients if c in self.dataset.clients}
        return {"loss": _number(found.loss), "groups": _numbers(found.groups), "clients": _numbers(mixes)}

    def _leakage(self, state: ServerState) -> dict[str, Any] | None:
        """What the server's adapter gives away, where the experiment wants to know it in this round."""
        every = self.experiment.audit.every
        if (
            every is None
            or not self.algorithm.shared
            or (state.round % every and state.round != self.experiment.rounds)
        ):
            return None
        rows = {"global": state.adapter} if state.round else {}
        found = leakage(self.experiment, self.dataset, self.machine, rows)
        return _numbers(found["global" if state.round else "base"])


def other_inputs(saved: Path, dataset: Dataset, machine: Machine) -> str | None:
    """What is not as `saved` (INPUTS) has it: "data are", say; None: nothing. Raises OSError, ValueError."""
    prompts = machine.template.sha256()
    then = {
        "prompt_sha256": prompts,
        **json.loads(saved.read_bytes()),
    }  # version 0.1.0 did not record the prompts
    if then.get("data_sha256") != dataset.sha256():
        return "data are"
    if not machine.is_base(then.get("base_sha256", "")):
        return "base model is"
    return None if then["prompt_sha256"] == prompts else "prompts' format is"


def held_out_part(experiment: Experiment, dataset: Dataset) -> tuple[Sequence[Any], list[str]]:
    """The held-out examples that periodic evaluation looks at: all, or the same few every time."""
    groups = dataset.groups()
    wanted = experiment.evaluation.examples
    if wanted is None or wanted >= len(groups):
        return dataset.test, groups
    step = len(groups) / wanted  # held-out examples lie group by group, so equal steps keep the mix
    chosen = [int(i * step) for i in range(wanted)]
    return [dataset.test[i] for i in chosen], [groups[i] for i in chosen]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value  # JSON has no NaN


def _numbers(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
