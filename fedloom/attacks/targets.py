"""What an attack is mounted on: the examples and secrets, and the models, the untuned base among them."""

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
    twins: Sequence[Example] = ()  # as many that were not planted
    references: Sequence[Example] = ()  # what either is ranked among


def targets(
    clients: Mapping[str, Sequence[Example]],
    held_out: Sequence[Example],
    canaries: Canaries | None = None,
    *,
    examples: int,
    references: int,
    seed: int,
) -> Targets:
    """`examples` of what the clients hold and as many held-out ones; with `canaries`, all that were planted,
    and `references` more that nobody planted."""
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
    """`n` training examples, as many of one client as of another while they last; all of them where there are fewer."""
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
        raise ConfigError(
            f"Row {BASE!r} is the untuned base, got an adapter of that name; call it otherwise."
        )
    return {BASE: None, **adapters}
