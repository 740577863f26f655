"""What the public, another client and the server learn from a run, each figure beside its control."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from fedloom.attacks import cross_client, discoverable, inversion, ranking
from fedloom.attacks.exposure import Exposure, Pool, exposures, p_value
from fedloom.attacks.extraction import extract
from fedloom.attacks.membership import membership, separation
from fedloom.attacks.one_run import one_run
from fedloom.attacks.release import RELEASED
from fedloom.attacks.targets import Targets, draw, with_base
from fedloom.attacks.view import ServerView, aggregated
from fedloom.client import Client
from fedloom.data.example import Example
from fedloom.data.text import rouge_l
from fedloom.engine.lora_engine import LoraEngine
from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.settings import Experiment
from fedloom.messages import ClientId
from fedloom.rng import numpy_stream
from fedloom.state import AdapterState
from fedloom.statistics import proportion, share
from fedloom.synthesis.filters import whole

NEAR = 0.7  # above this ROUGE-L a synthetic example is a near-copy: FedPIT's filter
DELTA = 1e-5  # confidence of the bound on epsilon
SHORTEST = 5  # words a field must have to be looked for in samples
ATTACKERS = 2
NO_CANARIES = "no canaries were planted: set data.canaries and train again"


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
    """Attack as anyone with the adapter who knows prompts, beginnings or candidate training examples."""
    engine, template = machine.engine, machine.template
    rows, length = {RELEASED: adapter}, experiment.evaluation.max_new_tokens
    every = with_base(rows)
    said = extract(engine, template, rows, on.members, on.held_out, max_new_tokens=length)
    brought_back = discoverable.discover(engine, template, rows, on.members, on.held_out)
    text = ranking.TrainingText(
        [e for own in dataset.clients.values() for e in own], dataset.test, shortest=SHORTEST
    )
    # A prompt without an instruction: a model trained on responses alone begins one after it.
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
    """Clients drawn at random try to get the others' codes, prompting with how their own records begin."""
    secrets = {c: sorted({code(e) for e in own if e.private} - {""}) for c, own in dataset.clients.items()}
    if len([c for c in secrets if secrets[c]]) < 2:
        return {"cross_client": {"reason": NO_CANARIES}}
    names = sorted(dataset.clients)
    drawn = numpy_stream(experiment.seed, "audit", "attackers").permutation(len(names))[:ATTACKERS]
    attackers = [names[i] for i in drawn]
    # Its own secrets come first: they best show how the others' begin.
    known = {
        a: sorted(dict.fromkeys(dataset.clients[a]), key=lambda e: not e.private)[: experiment.audit.examples]
        for a in attackers
    }
    extracted = cross_client.attack(
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
    return {"cross_client": {row: {a: one.plain() for a, one in by.items()} for row, by in extracted.items()}}


def code(example: Example) -> str:
    """The digits at the end of a response, where a secret would be; empty if there are none."""
    found = re.search(r"(\d(?:\s*\d)*)\W*$", example.response)
    return found[1] if found else ""


def of_server(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    engine: LoraEngine,
    clients: Mapping[ClientId, Client],
    start: AdapterState,
    views: Mapping[ClientId, ServerView],
) -> dict[str, Any]:
    """Attack as the server: read one upload of the last round, from the client with the fewest examples.

    Such an upload reveals most. Then repeat with only the mean of all uploads, as under secure aggregation.
    `start` is the adapter at the beginning of the round, `views` are its uploads.
    """
    usable = {c: view for c, view in views.items() if view.delta.is_finite()}
    if not usable:
        return {"reason": f"no usable upload in the last round, out of {len(views)}"}
    client = min(usable, key=lambda c: (len(clients[c].examples), c))
    everybody = aggregated(list(usable.values()))
    own = clients[client].examples
    steps = int(usable[client].update.metrics.get("steps", 0))
    inputs = inversion.layer_inputs(engine.model, start)

    def seen(view: ServerView) -> dict[str, Any]:
        return {
            "inversion": _inverted(experiment, dataset, machine, view, inputs, own, steps),
            "membership": _told(experiment, dataset, machine, view, client),
        }

    return {
        "client": client,
        "round": usable[client].broadcast.round + 1,
        "examples": len(own),
        **seen(usable[client]),
        "aggregated": {"clients": len(usable), **seen(everybody)},
    }


def _inverted(
    experiment: Experiment,
    dataset: Dataset,
    machine: Machine,
    view: ServerView,
    inputs: inversion.FirstInputs | inversion.Inapplicable,
    examples: Sequence[Example],
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
    # Adam's blur misleads a long search; the span test alone is not affected.
    ranked = inversion.invert(view, inputs, guesses=64 if local.optimizer == "sgd" else 0, decayed=gone)
    if isinstance(ranked, inversion.Inapplicable):
        return {"reason": ranked.reason}
    known = {*template.prompt_ids(""), template.end}
    own, held_out = (
        {i for e in texts for i in template.encode(e).ids} - known for texts in (examples, dataset.test)
    )
    recall = inversion.recall(ranked, own, known=known)
    if not recall.tokens:
        return {"reason": "the client's examples hold no token beyond the prompt format"}
    hits = proportion(round(recall.recall * recall.tokens), recall.tokens)
    # Tokens common to all such texts rank high too: those that held-out examples have and this client lacks.
    first = set([i for i in ranked.tokens.tolist() if i not in known][: recall.tokens])
    others = held_out - own
    control = _plain(share(len(others & first), len(others)))
    return {**asdict(recall), "ci95": hits.ci95, "held_out": control, "directions": ranked.directions}


def _told(
    experiment: Experiment, dataset: Dataset, machine: Machine, view: ServerView, client: str
) -> dict[str, Any]:
    plain = [e for e in dataset.clients[client] if not e.private]
    own = draw({client: plain}, experiment.audit.examples, seed=experiment.seed)
    if not own:
        return {"reason": "the client holds nothing but secrets"}
    scores = inversion.membership(view, machine.engine, [*own, *in_the_mix_of(own, dataset)])
    return separation(scores[: len(own)], scores[len(own) :]).plain()


def in_the_mix_of(own: Sequence[Example], data: Dataset) -> list[Example]:
    """As many held-out examples as match the proportions of `own`'s groups; all, where no group is held out.

    Otherwise an update that teaches one kind of task would look like one that betrays membership.
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
    """How close generated examples come to their client's private ones, beside as many held-out examples."""
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
    """The epsilon refuted by guessing that the quarter with the best calibrated exposure was planted."""
    known = public["exposure"].get(RELEASED)
    if known is None:
        return {"reason": NO_CANARIES}
    planted, twins = (known["calibrated"][side]["bits"] for side in ("planted", "held_out"))
    guesses = max(1, (len(planted) + len(twins)) // 4)
    bound = one_run(planted, twins, guesses=[guesses], delta=DELTA)
    return {
        **bound.plain(),
        "approximate": "which canaries to plant was fixed in advance, not decided by a coin toss for each",
    }


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
