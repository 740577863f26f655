"""One training in a folder: started, killed, resumed, finished. On a network this is the coordinator.

It knows an algorithm, a transport and callables. Data, base model and settings are its builder's business.

inputs.json     hashes of data, base model and prompts: a training is resumed with exactly these
metrics.jsonl   one line a round
state/          the last two committed rounds (storage/checkpoint.py)
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

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.errors import RunError
from fedloom.experiment.listener import Listener
from fedloom.federation import Federation, Round
from fedloom.gate import Gate
from fedloom.messages import ClientId
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, durable, journal
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.files import INPUTS, METRICS, STATE
from fedloom.transport.base import Transport

# (the server's state after a round, the round's events) -> further fields of its line in the journal.
# Also called before the first round, with a round that has no cohort.
Observer = Callable[[ServerState, Round], Mapping[str, Any]]
WHAT = {"data_sha256": "data are", "base_sha256": "base model is", "prompt_sha256": "prompts' format is"}


@dataclass(frozen=True)
class Training:
    """One row of a comparison: an algorithm over some clients, in a folder of its own."""

    folder: Path
    algorithm: Algorithm
    transport: Transport
    select: Callable[[int], Sequence[ClientId]]  # round -> cohort
    start: AdapterState  # the adapter before the first round
    rounds: int
    inputs: Mapping[str, str]  # hashes of what the adapter depends on besides the settings; see WHAT
    fingerprint: str  # of the settings
    observe: Sequence[Observer] = ()  # each adds fields to a round's line in the journal
    gate: Gate = Gate()

    def finish(self, listener: Listener) -> ServerState:
        """Run to the last round, starting from the newest committed one if there is any.

        The result does not depend on where or how often the training was interrupted.
        """
        state_folder, metrics = self.folder / STATE, self.folder / METRICS
        # Create `state` before the journal's first write: that write syncs the parent folder, so a power cut
        # cannot lose it.
        state_folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.newest(state_folder, fingerprint=self.fingerprint)
        for damage in found.damaged:
            listener.warned(f"not used because it is damaged: {damage}; going on from the round before it")
        if found.checkpoint is None:
            durable.write(self.folder / INPUTS, json.dumps(dict(self.inputs), indent=1).encode())
            state = self.algorithm.init(self.start)
            record: Mapping[str, Any] = self._record(state, Round(-1, ()), seconds=0.0)
            journal.align(metrics, None)
            self._commit(state, record)
        else:
            self._check_inputs()
            state, record = found.checkpoint.state, found.checkpoint.record
            self.transport.restore(found.checkpoint.transport)
            if lost := journal.align(metrics, record):
                listener.warned(
                    f"{metrics} was damaged and lacks round {', '.join(map(str, lost))}; the result is not affected"
                )
        listener.phase("training")
        cohort = fmean(len(self.select(r)) for r in range(self.rounds))
        listener.started(rounds=self.rounds, completed=state.round, cohort=cohort)
        clock = time.monotonic()

        def after_round(state: ServerState, seen: Round) -> None:
            nonlocal clock
            record = self._record(state, seen, seconds=time.monotonic() - clock)
            self._commit(state, record)
            listener.committed(record)
            clock = time.monotonic()

        federation = Federation(
            self.algorithm, self.transport, self.select, after_round, listener.updated, self.gate
        )
        return federation.run(state, self.rounds)

    def _check_inputs(self) -> None:
        """Refuse to go on with data, prompts or a base model other than the training began with."""
        saved = self.folder / INPUTS
        try:
            then = json.loads(saved.read_bytes())
            odd = [what for key, what in WHAT.items() if then[key] != self.inputs[key]]
        except (OSError, ValueError, KeyError, TypeError) as damaged:
            raise RunError(f"{saved} is missing or damaged; start again with another --out.") from damaged
        if odd:
            raise RunError(
                f"The {odd[0]} not what this run began with ({saved}). Put the old back, or start a new run in another --out."
            )

    def _commit(self, state: ServerState, record: Mapping[str, Any]) -> None:
        made = Checkpoint(state, self.transport.snapshot(), record)
        checkpoint.commit(self.folder / STATE, made, fingerprint=self.fingerprint)
        journal.append(self.folder / METRICS, record)

    def _record(self, state: ServerState, seen: Round, *, seconds: float) -> dict[str, Any]:
        losses = {c: (u.metrics["loss"], u.weight) for c, u in seen.updates.items() if "loss" in u.metrics}
        heard = [(loss, weight) for loss, weight in losses.values() if math.isfinite(loss)]
        total = sum(weight for _, weight in heard)
        record = {
            "round": state.round,
            "cohort": list(seen.cohort),
            "clients": {
                c: {"weight": u.weight, **journal.finite(u.metrics)} for c, u in sorted(seen.updates.items())
            },
            "refused": dict(sorted(seen.refused.items())),
            "loss": sum(loss * weight for loss, weight in heard) / total if total else None,
            "bytes_up": seen.bytes_up,
            "bytes_down": seen.bytes_down,
            "tokens": int(sum(u.metrics.get("tokens", 0) for u in seen.updates.values())),
            "seconds": round(seconds, 3),
            "adapter_sha256": state.adapter.sha256(),
        }
        for observer in self.observe:
            record |= observer(state, seen)
        return record
