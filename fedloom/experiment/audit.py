"""What can be learnt from a run by whoever gets its adapter, by another client, and by the server; and a release gate.

Every attack of `fedloom.attacks` that fits, on one finished run, in one JSON: never a text, always beside the
untuned base and beside examples or secrets that nobody trained on. The server's position is not simulated anew:
the last round is replayed from the round committed before it, so its uploads are those that were sent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.attacks import cross_client, discoverable, inversion, ranking
from fedloom.attacks.exposure import Exposure, Pool, exposures, p_value
from fedloom.attacks.extraction import draw, extract
from fedloom.attacks.intervals import proportion
from fedloom.attacks.measures import share, with_base
from fedloom.attacks.membership import membership, separation
from fedloom.attacks.one_run import one_run
from fedloom.attacks.release import RELEASED, Limits, gate
from fedloom.attacks.view import ServerView, aggregated
from fedloom.data.example import Example
from fedloom.data.text import rouge_l
from fedloom.engine.lora_engine import LoraEngine
from fedloom.errors import ConfigError, RunError
from fedloom.experiment.commands import adapter_of
from fedloom.experiment.datasets import Dataset, load_data
from fedloom.experiment.inputs import other_inputs
from fedloom.experiment.leakage import Targets, targets
from fedloom.experiment.machine import Machine, load_here
from fedloom.experiment.settings import ALGORITHM, Experiment
from fedloom.experiment.simulation import Simulated, federated
from fedloom.experiment.summary import write_json
from fedloom.experiment.toml import load
from fedloom.experiment.training import INPUTS
from fedloom.rng import numpy_stream
from fedloom.state import AdapterState
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.synthesis.filters import whole

SCHEMA = 1
AUDIT = "audit.json"
SAMPLES = 64  # texts a model is let to say unasked; FULL with --full
FULL = 1024
NEAR = 0.7  # ROUGE-L above which a synthetic example is a near-copy: FedPIT's filter
DELTA = 1e-5  # of the bound on epsilon
SHORTEST = 5  # words of a field that is looked for in samples
ATTACKERS = 2
CHANGEABLE = (
    "audit",
    "evaluation",
    "leakage",
    "machine",
    "model",
)  # sections: how things are measured, not what was trained
NO_CANARIES = "no canaries were planted: set data.canaries and train anew"


def audit(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    limits: Limits = Limits(),
    samples: int = SAMPLES,
    full: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Attack a finished run or comparison from every position; returns what audit.json then holds.

    `overrides` may change how is measured (audit.*, evaluation.*, machine.*), never what was trained on. `say`
    hears what begins. Raises: FedloomError; a failed gate is no error, see "passed".
    """
    saved = load(run)
    experiment = _same_training(saved, load(run, overrides))
    limits.check(references=experiment.audit.references, canaries=experiment.data.canaries is not None)
    if not experiment.algorithm.shared:
        raise RunError(
            f'algorithm = "{ALGORITHM.name(experiment.algorithm)}" shares no model: nothing of this run is released.'
        )
    home = run if (run / "state").exists() else run / f"seed-{saved.seed}" / "federated"
    say("data and model")
    dataset, (machine, engine) = load_data(experiment), load_here(experiment)
    adapter = adapter_of(run, machine)
    simulated = federated(saved, dataset, machine, home)  # what was sent does not depend on how it is audited
    _same_inputs(home / INPUTS, dataset, machine)
    on = targets(experiment, dataset)
    committed = _committed(home, saved.fingerprint())
    say("whoever gets the adapter")
    public = of_public(experiment, dataset, machine, adapter, on, samples=samples, full=full)
    say("another client")
    client = of_client(experiment, dataset, machine, adapter, on)
    say("the server")
    earlier = committed and _committed(home, saved.fingerprint(), before=committed.state.round)
    server = (
        of_server(saved, dataset, machine, engine, simulated, earlier)
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
    """Members that never were trained on would make any model look harmless."""
    try:
        odd = other_inputs(path, dataset, machine)
    except (OSError, ValueError) as damaged:
        raise RunError(
            f"{path} is missing or damaged, so nobody can tell what the run was trained on."
        ) from damaged
    if odd:
        raise RunError(
            f"The {odd} not what this run was trained with ({path}). Put the old back, then audit."
        )


def _committed(home: Path, fingerprint: str, *, before: int | None = None) -> Checkpoint | None:
    return checkpoint.newest(home / "state", fingerprint=fingerprint, before=before).checkpoint


# --- positions --------------------------------------------------------------------------------------------


def of_public(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    adapter: AdapterState,
    on: Targets,
    *,
    samples: int,
    full: bool,
) -> dict[str, Any]:
    """Whoever downloads the adapter, and knows prompts, beginnings or candidates of what was trained on."""
    engine, template = machine.engine, machine.template
    rows, length = {RELEASED: adapter}, experiment.evaluation.max_new_tokens
    every = with_base(rows)
    said = extract(engine, template, rows, on.members, on.held_out, max_new_tokens=length)
    brought_back = discoverable.discover(engine, template, rows, on.members, on.held_out)
    text = ranking.TrainingText(
        [e for own in dataset.clients.values() for e in own], dataset.test, shortest=SHORTEST
    )
    # A prompt without an instruction: where responses alone were learnt, they begin after it.
    talk = ranking.rank(
        engine,
        template,
        rows,
        text,
        samples=samples,
        max_new_tokens=length,
        opening=template.prompt_ids(""),
        seed=experiment.seed,
    )
    told = membership(engine, on.members, on.held_out, every)
    found: dict[str, Any] = {
        "extraction": {row: one.plain() for row, one in said.items()},
        "discoverable": {row: one.plain() for row, one in brought_back.items()},
        "ranking": {row: one.plain() for row, one in talk.items()},
        "membership": {row: {name: one.plain() for name, one in by.items()} for row, by in told.items()},
        "exposure": {"reason": NO_CANARIES},
    }
    if full:
        exact = discoverable.greedy(engine, template, rows, on.members, on.held_out)
        found["greedy"] = {row: one.plain() for row, one in exact.items()}
    if on.canaries:
        found["exposure"] = _exposure(machine, every, on)
    return found


def _exposure(machine: Machine, rows: Mapping[str, AdapterState | None], on: Targets) -> dict[str, Any]:
    known = exposures(machine.engine, [Pool(list(on.canaries), on.twins, on.references)], rows)
    released: Exposure = known[RELEASED]["calibrated"]
    groups = sorted(set(on.canaries.values()))
    bits = {
        n: [b for b, m in zip(released.planted.bits, on.canaries.values(), strict=True) if m == n]
        for n in groups
    }
    return {
        **{row: {score: one.plain() for score, one in by.items()} for row, by in known.items()},
        "by_copies": [
            {"copies": n, "canaries": len(of), "mean": fmean(of), "p_value": p_value(of)}
            for n, of in bits.items()
        ],
        "held_out": asdict(released.held_out),
    }


def of_client(
    experiment: Experiment, dataset: Dataset, machine: Machine, adapter: AdapterState, on: Targets
) -> dict[str, Any]:
    """Clients drawn by lot fish for the codes of all others, with how their own records begin."""
    secrets = {c: sorted({code(e) for e in own if e.private} - {""}) for c, own in dataset.clients.items()}
    if len([c for c in secrets if secrets[c]]) < 2:
        return {"cross_client": {"reason": NO_CANARIES}}
    names = sorted(dataset.clients)
    drawn = numpy_stream(experiment.seed, "audit", "attackers").permutation(len(names))[:ATTACKERS]
    attackers = [names[i] for i in drawn]
    # Its own secrets come first: they show best how the others' begin.
    known = {
        a: sorted(dict.fromkeys(dataset.clients[a]), key=lambda e: not e.private)[: experiment.audit.examples]
        for a in attackers
    }
    fished = cross_client.attack(
        machine.engine,
        machine.template,
        {RELEASED: adapter},
        known,
        secrets,
        [code(e) for e in on.twins],
        attackers=attackers,
        max_new_tokens=experiment.evaluation.max_new_tokens,
        seed=experiment.seed,
    )
    return {"cross_client": {row: {a: one.plain() for a, one in by.items()} for row, by in fished.items()}}


def code(example: Example) -> str:
    """The digits at the end of a response, which is where a secret stands; empty without any."""
    found = re.search(r"(\d(?:\s*\d)*)\W*$", example.response)
    return found[1] if found else ""


def of_server(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    engine: LoraEngine,
    simulated: Simulated,
    before: Checkpoint,
) -> dict[str, Any]:
    """The server reads one upload of the last round, of the client with the fewest examples: it tells most.

    Then the same with nothing but the mean of all uploads, as under secure aggregation.
    """
    views = replay(simulated, before)
    usable = {c: view for c, view in views.items() if view.delta.is_finite()}
    if not usable:
        return {"reason": f"no usable upload in round {before.state.round + 1}, out of {len(views)}"}
    client = min(usable, key=lambda c: (len(simulated.clients[c].examples), c))
    everybody = aggregated(list(usable.values()))
    steps = int(usable[client].update.metrics.get("steps", 0))
    inputs = inversion.layer_inputs(engine.model, before.state.adapter)

    def seen(view: ServerView) -> dict[str, Any]:
        return {
            "inversion": _inverted(experiment, dataset, machine, view, inputs, client, steps),
            "membership": _told(experiment, dataset, machine, view, client),
        }

    return {
        "client": client,
        "round": before.state.round + 1,
        "examples": len(simulated.clients[client].examples),
        **seen(usable[client]),
        "aggregated": {"clients": len(usable), **seen(everybody)},
    }


def replay(simulated: Simulated, before: Checkpoint) -> dict[str, ServerView]:
    """The round after `before` once more: client -> what the server saw of it, as it was sent."""
    training = simulated.training
    training.transport.restore(before.transport)
    sent = {c: training.algorithm.broadcast(before.state, c) for c in training.select(before.state.round)}
    return {a.client: ServerView(sent[a.client], a.open()) for a in training.transport.exchange(sent)}


def _inverted(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    view: ServerView,
    inputs: inversion.FirstInputs | inversion.Inapplicable,
    client: str,
    steps: int,
) -> dict[str, Any]:
    local, template = experiment.local, machine.template
    if isinstance(inputs, inversion.Inapplicable):
        return {"reason": inputs.reason}
    gone = inversion.shrinkage(
        learning_rate=local.at(view.broadcast.round).learning_rate,
        weight_decay=local.weight_decay,
        steps=steps,
        momentum=local.momentum if local.optimizer == "sgd" else 0.0,
    )
    # Adam's blur misleads a long search; the span test alone does not mind.
    ranked = inversion.invert(view, inputs, guesses=64 if local.optimizer == "sgd" else 0, decayed=gone)
    if isinstance(ranked, inversion.Inapplicable):
        return {"reason": ranked.reason}
    known = {*template.prompt_ids(""), template.end}
    own, held_out = (
        {i for e in examples for i in template.encode(e).ids} - known
        for examples in (dataset.clients[client], dataset.test)
    )
    recall = inversion.recall(ranked, own, known=known)
    if not recall.tokens:
        return {"reason": "the client's examples hold no token beyond the prompt format"}
    hits = proportion(round(recall.recall * recall.tokens), recall.tokens)
    # What every text of this kind is full of ranks high, too: tokens that held-out examples have and this client has not.
    first = set([i for i in ranked.tokens.tolist() if i not in known][: recall.tokens])
    others = held_out - own
    control = _plain(share(len(others & first), len(others)))
    return {**asdict(recall), "ci95": hits.ci95, "held_out": control, "directions": ranked.directions}


def _told(
    experiment: Experiment, dataset: Dataset, machine: Machine, view: ServerView, client: str
) -> dict[str, Any]:
    plain = {client: [e for e in dataset.clients[client] if not e.private]}
    own = draw(plain, experiment.audit.examples, seed=experiment.seed)
    if not own:
        return {"reason": "the client has nothing but secrets"}
    scores = inversion.membership(view, machine.engine, [*own, *in_the_mix_of(own, dataset)])
    return separation(scores[: len(own)], scores[len(own) :]).plain()


def in_the_mix_of(own: Sequence[Example], data: Dataset) -> list[Example]:
    """As many held-out examples as have the groups of `own` in its proportions; all, where no group is held out.

    Else an update that teaches one kind of task would pass for one that betrays who was there.
    """
    wanted = Counter(getattr(e, data.by) for e in own)
    held: dict[str, list[Example]] = {}
    for e, group in zip(data.test, data.groups(), strict=True):
        if group in wanted:
            held.setdefault(group, []).append(e)
    rate = min((len(examples) / wanted[group] for group, examples in held.items()), default=0.0)
    alike = [e for group, examples in held.items() for e in examples[: max(1, round(rate * wanted[group]))]]
    return alike or list(data.test)


def of_synthesis(dataset: Dataset, memories: Mapping[str, Mapping[str, Any]], *, seed: int) -> dict[str, Any]:
    """How near generated examples come to what their client keeps private, beside as many held-out examples."""
    found = {}
    for client, memory in sorted(memories.items()):
        texts = [whole(Example(**e)) for e in memory.get("synthetic", {}).get("examples", [])]
        if client not in dataset.clients or not texts:
            continue
        own = list(dict.fromkeys(dataset.clients[client]))
        others = draw({"": dataset.test}, len(own), seed=seed)
        nearest = [max(rouge_l(whole(e), text) for e in own) for text in texts]
        secrets = {code(e) for e in own if e.private} - {""}
        found[client] = {
            "examples": len(texts),
            "private": len(own),
            "mean": fmean(nearest),
            "max": max(nearest),
            "near": asdict(proportion(sum(r > NEAR for r in nearest), len(nearest))),
            "held_out": fmean(max(rouge_l(whole(e), text) for e in others) for text in texts),
            "secrets": _plain(share(sum(any(s in text for text in texts) for s in secrets), len(secrets))),
        }
    return {"clients": found} if found else {"reason": "no client keeps synthetic examples"}


def lower_bound(public: Mapping[str, Any]) -> dict[str, Any]:
    """Epsilon that canaries and their twins refute, guessing "planted" of the best quarter by calibrated exposure."""
    known = public["exposure"].get(RELEASED)
    if known is None:
        return {"reason": NO_CANARIES}
    planted, twins = (known["calibrated"][side]["bits"] for side in ("planted", "held_out"))
    guesses = max(1, (len(planted) + len(twins)) // 4)
    bound = one_run(planted, twins, guesses=[guesses], delta=DELTA)
    return {
        **bound.plain(),
        "approximate": "which canaries were planted was fixed, not decided by a coin for each",
    }


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
