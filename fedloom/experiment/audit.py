"""Attack a finished run as the public, as another client and as the server; and a release gate.

Runs every applicable attack on a finished run and writes the numbers (no text) to one JSON, each beside the
untuned base and beside examples nobody trained on. The server's position is not simulated anew: the last
round is replayed from the round committed before it, so its uploads are those that were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedloom.attacks.release import Limits, gate
from fedloom.attacks.view import ServerView
from fedloom.errors import ConfigError, RunError
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.finished import adapter_of, finished
from fedloom.experiment.inputs import other_inputs
from fedloom.experiment.machine import Machine, load_here
from fedloom.experiment.measure import targets_of
from fedloom.experiment.positions import lower_bound, of_client, of_public, of_server, of_synthesis
from fedloom.experiment.settings import ALGORITHM, Experiment
from fedloom.experiment.simulation import Simulated, federated
from fedloom.report import page
from fedloom.storage import checkpoint, files
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.files import AUDIT, INPUTS, STATE, write_json

SCHEMA = 1
SAMPLES = 64  # unprompted samples to draw; FULL with --full
FULL = 1024
CHANGEABLE = (
    "audit",
    "evaluation",
    "leakage",
    "machine",
    "model",
)  # sections: how things are measured, not what was trained


def audit(
    run: Path | str,
    overrides: Sequence[str] = (),
    *,
    limits: Limits = Limits(),
    samples: int = SAMPLES,
    full: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Attack a finished run or comparison from every position; returns what audit.json then holds.

    `overrides` may change how things are measured (audit.*, evaluation.*, machine.*), never the training
    data. `say` is told each step as it begins. Raises: FedloomError; a failed gate is not an error, see
    "passed".
    """
    run = Path(run)
    saved = finished(run)
    experiment = _same_training(saved, finished(run, overrides))
    limits.check(references=experiment.audit.references, canaries=experiment.data.canaries is not None)
    if not experiment.algorithm.shared:
        raise RunError(
            f'algorithm = "{ALGORITHM.name(experiment.algorithm)}" shares no model: nothing of this run is released.'
        )
    home = files.home(run, saved.seed)
    say("data and model")
    dataset, (machine, engine) = load_data(experiment), load_here(experiment)
    adapter = adapter_of(run, machine)
    simulated = federated(saved, dataset, machine, home)  # audit settings do not change what was sent
    _same_inputs(home / INPUTS, dataset, machine)
    on = targets_of(experiment, dataset)
    committed = _committed(home, saved.fingerprint())
    say("anyone with the adapter")
    public = of_public(experiment, dataset, machine, adapter, on, samples=samples, full=full)
    say("another client")
    client = of_client(experiment, dataset, machine, adapter, on)
    say("the server")
    earlier = committed and _committed(home, saved.fingerprint(), before=committed.state.round)
    server = (
        of_server(
            experiment,
            dataset,
            machine,
            engine,
            simulated.clients,
            earlier.state.adapter,
            replay(simulated, earlier),
        )
        if earlier
        else {
            "reason": f"the last two committed rounds are needed to replay one, and are not in {home.name}/state"
        }
    )
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "name": experiment.name,
        "adapter_sha256": adapter.sha256(),
        "settings": {
            **experiment.audit.model_dump(mode="json"),
            "max_new_tokens": experiment.evaluation.max_new_tokens,
            "samples": samples,
            "full": full,
        },
        "targets": {
            "members": len(on.members),
            "held_out": len(on.held_out),
            "canaries": len(on.canaries),
            "twins": len(on.twins),
            "references": len(on.references),
        },
        "positions": {"public": public, "client": client, "server": server},
        "synthesis": of_synthesis(
            dataset, committed.transport.memories if committed else {}, seed=experiment.seed
        ),
        "one_run": lower_bound(public),
    }
    found |= gate(found, limits)
    write_json(run / AUDIT, found)
    page.write(run)
    return found


# --- what an audit is about -------------------------------------------------------------------------------


def _same_training(saved: Experiment, wanted: Experiment) -> Experiment:
    then, now = saved.plain(), wanted.plain()
    if odd := sorted(
        key for key in then.keys() | now.keys() if key not in CHANGEABLE and then.get(key) != now.get(key)
    ):
        raise ConfigError(
            f"An audit looks for what this run was trained on, so it cannot change {odd[0]!r}. "
            f"Expected settings of {', '.join(CHANGEABLE)} only."
        )
    return wanted


def _same_inputs(path: Path, dataset: Dataset, machine: Machine) -> None:
    """Refuse changed data: members that were never trained on would make any model look harmless."""
    try:
        odd = other_inputs(path, dataset, machine)
    except (OSError, ValueError) as damaged:
        raise RunError(
            f"{path} is missing or damaged, so there is no record of the run's training data."
        ) from damaged
    if odd:
        raise RunError(
            f"The {odd} not what this run was trained with ({path}). Restore the old state, then audit."
        )


def _committed(home: Path, fingerprint: str, *, before: int | None = None) -> Checkpoint | None:
    return checkpoint.newest(home / STATE, fingerprint=fingerprint, before=before).checkpoint


def replay(simulated: Simulated, before: Checkpoint) -> dict[str, ServerView]:
    """Replay the round after `before`: client -> the server's view of its upload, exactly as it was sent."""
    training = simulated.training
    training.transport.restore(before.transport)
    sent = {c: training.algorithm.broadcast(before.state, c) for c in training.select(before.state.round)}
    return {a.client: ServerView(sent[a.client], a.open()) for a in training.transport.exchange(sent)}
