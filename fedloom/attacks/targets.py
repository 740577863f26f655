"""The targets of attacks: examples and secrets, and the models, the untuned base included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from fedloom.data.canaries import Canaries, copies
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.rng import numpy_stream
from fedloom.rows import BASE
from fedloom.state import AdapterState


@dataclass(frozen=True)
class Targets:
    """The same for every model of a seed."""

    members: Sequence[Example]  # drawn evenly over the clients; no secrets among them
    held_out: Sequence[Example]
    canaries: Mapping[Example, int] = field(default_factory=dict)  # planted secrets, and their copies
    twins: Sequence[Example] = ()  # equally many that were not planted
    references: Sequence[Example] = ()  # both are ranked among these


def targets(
    clients: Mapping[str, Sequence[Example]],
    held_out: Sequence[Example],
    canaries: Canaries | None = None,
    *,
    examples: int,
    references: int,
    seed: int,
) -> Targets:
    """`examples` of the clients' examples and equally many held-out ones.

    With `canaries`, also all that were planted, and `references` more that were not.
    """
    plain = {c: [e for e in own if not e.private] for c, own in clients.items()}
    members = draw({c: own for c, own in plain.items() if own}, examples, seed=seed)
    held = draw({"": held_out}, examples, seed=seed)
    if canaries is None:
        return Targets(members, held)
    planted: dict[Example, int] = {}
    for own in clients.values():
        planted |= copies(own)
    twins = canaries.held_out(len(planted), seed=seed)
    return Targets(members, held, planted, twins, canaries.references(references, seed=seed))


def draw(clients: Mapping[str, Sequence[Example]], n: int, *, seed: int) -> list[Example]:
    """`n` training examples, equally many of each client while they last; all of them if there are fewer."""
    names = sorted(clients)
    order = numpy_stream(seed, "attacks", "draw").permutation(len(names))
    rows = [
        [
            clients[name][i]
            for i in numpy_stream(seed, "attacks", "draw", name).permutation(len(clients[name]))
        ]
        for name in (names[i] for i in order)
    ]
    turns = chain.from_iterable(zip_longest(*rows))
    return [example for example in turns if example is not None][:n]


def with_base(adapters: Mapping[str, AdapterState | None]) -> dict[str, AdapterState | None]:
    """The models to attack, the untuned base first."""
    if adapters.get(BASE) is not None:
        raise ConfigError(f"Row {BASE!r} is the untuned base, got an adapter of that name; rename it.")
    return {BASE: None, **adapters}
