"""One client attacks the others: it prompts the shared model with its own records to get their secrets.

Every client receives the aggregated model and knows how records of this federation begin. It samples
continuations of such beginnings and keeps those that look like secrets (arXiv 2506.06060; there the secrets
are personal data, here any strings that the caller names). A secret that occurs in the attacker's own texts
does not count. Two controls tell leakage from luck: the untuned base, and decoys, secrets of the same kind
that no model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.attacks.targets import with_base
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.text import words
from fedloom.state import AdapterState
from fedloom.statistics import Proportion, share
from fedloom.steps import Engine, Generate

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the attacker's response that a prefix holds


def prefixes(template: Template, own: Sequence[Example]) -> list[tuple[int, ...]]:
    """Beginnings of the attacker's own records, each once: a prompt, and more and more of the response.

    Each response follows its own prompt and one without an instruction, where only its wording tells the
    model what to say, so that it is free to speak of somebody else.
    """
    blank = tuple(template.prompt_ids(""))
    found: dict[tuple[int, ...], None] = {}
    for example in own:
        tokens, _ = template.contrast(example)  # exactly the response is labelled
        first = tokens.labelled.index(True)
        prompt, response = tokens.ids[:first], tokens.ids[first:]
        for begun in (prompt, blank):
            for part in SHARES:
                found[(*begun, *response[: int(part * len(response))])] = None
    return list(found)


@dataclass(frozen=True)
class Extracted:
    """One attacker's results on one model."""

    coverage: Proportion | None  # share of secrets exclusive to the victims that came out at least once
    efficiency: Proportion | None  # share of queries whose answer holds at least one of them
    decoys: Proportion | None  # share of strings of the same kind, never trained on, that came out

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def attack(
    engine: Engine,
    template: Template,
    adapters: Mapping[str, AdapterState | None],
    clients: Mapping[str, Sequence[Example]],
    secrets: Mapping[str, Sequence[str]],
    decoys: Sequence[str] = (),
    *,
    attackers: Sequence[str],
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, dict[str, Extracted]]:
    """Row -> attacker -> its results. The untuned base is the row "base".

    `secrets` are each client's; an attacker is after those of all others. `samples` answers are drawn for
    every prefix. A secret counts if its words occur in an answer in sequence, whatever the case and the
    punctuation between them.
    """
    rows = with_base(adapters)
    queries = {a: [p for p in prefixes(template, clients[a]) for _ in range(samples)] for a in attackers}
    answers = engine.answer(
        {
            (row, a): Generate(
                queries[a],
                adapter,
                max_new_tokens=max_new_tokens,
                stop=template.stop,
                temperature=temperature,
                stream=("attacks", "cross-client", a),
                seed=seed,
            )
            for row, adapter in rows.items()
            for a in attackers
        }
    )
    wanted = {
        a: _exclusive(clients[a], [s for c in secrets if c != a for s in secrets[c]]) for a in attackers
    }
    unseen = {_spaced(decoy) for decoy in decoys}
    return {
        row: {
            a: _extracted([_spaced(template.decode(ids)) for ids in answers[row, a]], wanted[a], unseen)
            for a in attackers
        }
        for row in rows
    }


def _exclusive(own: Sequence[Example], secrets: Sequence[str]) -> set[str]:
    """The secrets, each once, that no text of the attacker holds; those without words are left out."""
    known = [_spaced(text) for e in own for text in e.texts]
    return {s for s in map(_spaced, secrets) if s.strip() and not any(s in text for text in known)}


def _extracted(answers: Sequence[str], secrets: set[str], decoys: set[str]) -> Extracted:
    return Extracted(
        coverage=share(sum(any(s in said for said in answers) for s in secrets), len(secrets)),
        efficiency=share(sum(any(s in said for s in secrets) for said in answers), len(answers)),
        decoys=share(sum(any(s in said for said in answers) for s in decoys), len(decoys)),
    )


def _spaced(text: str) -> str:
    """The words between spaces, so that only whole words match."""
    return f" {' '.join(words(text))} "
