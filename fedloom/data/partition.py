"""Splits examples over clients.

A partitioner is called with (examples, clients, seed) and returns client id -> indices into `examples`.
Clients come in the order of their ids, indices ascend, and every index is used exactly once. The split
depends on the examples and the seed alone. A client that would hold nothing is refused: it could never
train, and would only blur averages over clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from fedloom import rng
from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.messages import ClientId

Parts = dict[ClientId, list[int]]
Label = Literal["category", "owner"]  # the field that a split by label uses


class Partitioner(Protocol):
    @property
    def by(self) -> Label | None: ...  # None: it uses no label
    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts: ...


WAYS_OUT = {
    "category": 'Name the column that holds it, data.columns = { category = "..." }; or use groups of similar texts '
    'as categories, data.clusters = { count = 8 }; or split without any, data.partition.kind = "iid".',
    "owner": 'Name the column that holds it, data.columns = { owner = "..." }; or, where each file is one owner\'s, '
    'set data.owner = "file".',
}


@dataclass(frozen=True)
class IID:
    """Shuffle and deal: sizes differ by at most one."""

    by: ClassVar[Label | None] = None

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        count = _check_clients(clients, examples)
        order = rng.numpy_stream(seed, "partition", "iid").permutation(len(examples))
        return _numbered(np.array_split(order, count))


@dataclass(frozen=True)
class ByLabel:
    """Each client holds exactly `labels_per_client` labels.

    A label that several clients share is cut evenly between them; the larger a label, the more clients
    share it, so that sizes stay as close as the data allows. Refused if clients * labels_per_client
    is too small for every label to have a client.
    """

    labels_per_client: int = 1
    by: Label = "category"

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        count = _check_clients(clients, examples)
        generator = rng.numpy_stream(seed, "partition", "by_label")
        pools = _shared_pools(examples, self.by, generator)
        places = count * self.labels_per_client
        if not 1 <= self.labels_per_client <= len(pools):
            raise ConfigError(
                f"Expected labels_per_client between 1 and the {len(pools)} different values of "
                f"{self.by!r} in the data, got {self.labels_per_client}."
            )
        if places < len(pools):
            raise ConfigError(
                f"{count} clients with {self.labels_per_client} of {self.by!r} each cannot hold all "
                f"{len(pools)} of them; set labels_per_client to {-(-len(pools) // count)} or more."
            )
        cuts = dict.fromkeys(pools, 1)  # label -> number of shards
        for _ in range(places - len(pools)):
            # A client holds at most one shard of a label, and no shard is empty.
            open_ = [c for c in pools if cuts[c] < min(count, len(pools[c]))]
            if not open_:
                raise ConfigError(
                    f"{len(examples)} examples cannot be cut into {places} shards ({count} clients * "
                    f"{self.labels_per_client} labels); use fewer clients."
                )
            largest = max(open_, key=lambda c: len(pools[c]) / cuts[c])
            cuts[largest] += 1
        # A label has at most `count` shards; dealt in turn, they go to different clients.
        shards = [shard for c in pools for shard in np.array_split(pools[c], cuts[c])]
        hands = [np.concatenate(shards[i::count]) for i in range(count)]
        return _numbered([hands[i] for i in generator.permutation(count)])


@dataclass(frozen=True)
class Shards:
    """Sort by label, cut into `per_client` * clients equal shards, deal them at random.

    Two shards per client give FedAvg's pathological split and Shepherd's `diff_quantity = 0`: about two
    labels per client, three or four where a shard spans a border between labels.
    Source: McMahan et al. 2017, section 3; FederatedGPT-Shepherd, client_data_allocation.py.
    """

    per_client: int = 2
    by: Label = "category"

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        count = _check_clients(clients, examples)
        if not 1 <= self.per_client <= len(examples) // count:
            raise ConfigError(
                f"Expected per_client between 1 and {len(examples) // count} ({len(examples)} examples / "
                f"{count} clients), got {self.per_client}."
            )
        generator = rng.numpy_stream(seed, "partition", "shards")
        ordered = np.concatenate(list(_shared_pools(examples, self.by, generator).values()))
        shards = np.array_split(ordered, count * self.per_client)
        dealt = generator.permutation(len(shards)).reshape(count, self.per_client)
        return _numbered([np.concatenate([shards[s] for s in hand]) for hand in dealt])


@dataclass(frozen=True)
class Dirichlet:
    """Equal sizes, unequal mixes: each client draws its own mix of labels.

    Client k's mix is q_k ~ Dir(alpha * L * p), where p is the mix of all L labels in the data: with a uniform
    p this is Dir(alpha, ..., alpha), and a large alpha tends to IID whatever p is. The clients then take
    turns in random order: one example per turn, of a label drawn from their mix. Exhausted labels leave the
    mix. Taking turns spreads the leftovers, which would otherwise all go to the last client.

    Source: Hsu et al. 2019 (arXiv 1909.06335), section 3.
    """

    alpha: float = 0.5
    by: Label = "category"

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        count = _check_clients(clients, examples)
        _check_alpha(self.alpha)
        generator = rng.numpy_stream(seed, "partition", "dirichlet")
        pools = [pool.tolist() for pool in _shared_pools(examples, self.by, generator).values()]
        left = np.array([len(pool) for pool in pools])  # (L,)
        mixes = generator.dirichlet(self.alpha * len(pools) * left / left.sum(), count)  # (clients, L)
        parts: list[list[int]] = [[] for _ in range(count)]
        turns = generator.permutation(np.arange(len(examples)) % count)  # sizes differ by at most one
        for client, draw in zip(turns.tolist(), generator.random(len(examples)).tolist(), strict=True):
            mix = mixes[client] * (left > 0)
            if not mix.sum() > 0:  # every label in this client's mix is exhausted
                mix = left
            cumulative = mix.cumsum()
            # With subnormal shares the draw may round up to the whole sum: then take the last label left.
            drawn = min(
                int(cumulative.searchsorted(draw * cumulative[-1], side="right")), int(mix.nonzero()[0][-1])
            )
            parts[client].append(pools[drawn].pop())
            left[drawn] -= 1
        return _numbered(parts)


@dataclass(frozen=True)
class ShepherdDirichlet:
    """Unequal sizes and unequal mixes, as FedIT's code draws them (`diff_quantity = 1`).

    Each label is cut by proportions ~ Dir(alpha) over the clients, but a client that already holds its
    fair share N/K gets no more. The whole draw is repeated until the smallest client has `min_size`
    examples; after `tries` draws the experiment is refused.
    Source: FederatedGPT-Shepherd, client_data_allocation.py.
    """

    alpha: float = 0.5
    min_size: int = 40
    tries: int = 1000
    by: Label = "category"

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        count = _check_clients(clients, examples)
        _check_alpha(self.alpha)
        if not 1 <= self.min_size <= len(examples) // count:
            raise ConfigError(
                f"Expected min_size between 1 and {len(examples) // count} ({len(examples)} examples / "
                f"{count} clients), got {self.min_size}."
            )
        generator = rng.numpy_stream(seed, "partition", "shepherd_dirichlet")
        best = 0
        for _ in range(self.tries):
            pools = _shared_pools(examples, self.by, generator)
            parts = self._draw(list(pools.values()), count, len(examples) / count, generator)
            smallest = min(len(part) for part in parts)
            if smallest >= self.min_size:
                return _numbered(parts)
            best = max(best, smallest)
        raise ConfigError(
            f"No split in {self.tries} draws gave each of {count} clients {self.min_size} examples (the "
            f"best left one with {best}). Raise alpha (now {self.alpha}), or lower min_size or clients."
        )

    def _draw(
        self, pools: Sequence[np.ndarray], count: int, fair: float, generator: np.random.Generator
    ) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(count)]
        for pool in pools:
            full = np.array([len(part) >= fair for part in parts])
            shares = np.where(full, 0.0, generator.dirichlet(np.full(count, self.alpha)))
            if not shares.sum() > 0:  # a tiny alpha can give everything to full clients
                shares = np.where(full, 0.0, 1.0)
            cuts = (shares.cumsum() / shares.sum() * len(pool)).astype(int)[:-1]
            for part, piece in zip(parts, np.split(pool, cuts), strict=True):
                part.extend(piece.tolist())
        return parts


@dataclass(frozen=True)
class ByOwner:
    """The natural split: one client for each owner in the data, under the owner's name.

    `clients` may be left out; any number other than that of the owners is refused.
    """

    by: ClassVar[Label | None] = None

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        parts: Parts = {}
        for i, example in enumerate(examples):
            parts.setdefault(example.owner, []).append(i)
        if not parts:
            raise ConfigError("Expected examples to split over clients, got none.")
        check_named(examples, "owner", "a split by owner")
        if clients not in (None, len(parts)):
            raise ConfigError(
                f"Expected one client for each of {len(parts)} owners, got clients={clients}; leave data.clients out, or set it to {len(parts)}."
            )
        return dict(sorted(parts.items()))


@dataclass(frozen=True)
class BySize:
    """Random contents, unequal sizes: give exactly one of the three.

    `sizes`: relative sizes, one per client, scaled to use every example. `log_normal`: the sigma of sizes
    drawn as exp(sigma * normal). `power_law`: the exponent; client i gets a share of i ** -exponent. Every
    client gets at least one example.
    """

    sizes: tuple[float, ...] = ()
    log_normal: float | None = None
    power_law: float | None = None
    by: ClassVar[Label | None] = None

    def __call__(self, examples: Sequence[Example], clients: int | None, seed: int) -> Parts:
        if (len(self.sizes) > 0) + (self.log_normal is not None) + (self.power_law is not None) != 1:
            raise ConfigError("A split by size needs exactly one of sizes, log_normal and power_law.")
        if self.sizes and clients not in (None, len(self.sizes)):
            raise ConfigError(f"Expected one size for each of {clients} clients, got {len(self.sizes)}.")
        count = _check_clients(len(self.sizes) or clients, examples)
        generator = rng.numpy_stream(seed, "partition", "by_size")
        if self.sizes:
            shares = np.array(self.sizes, dtype=float)
        elif self.log_normal is not None:
            logs = self.log_normal * generator.standard_normal(count)
            shares = np.exp(logs - logs.max())  # relative, so that no sigma overflows
        else:
            shares = np.arange(1, count + 1, dtype=float) ** -(self.power_law or 0.0)
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise ConfigError("Expected every size to be positive and finite; these are not, or too unequal.")
        # One each, the rest by largest remainder, so that no client is empty and no example is left over.
        wanted = shares / shares.sum() * len(examples)
        sizes = np.maximum(1, np.floor(wanted).astype(int))
        while sizes.sum() != len(examples):
            step = 1 if sizes.sum() < len(examples) else -1
            gap = np.where((sizes > 1) | (step > 0), step * (wanted - sizes), -np.inf)
            sizes[int(gap.argmax())] += step
        order = generator.permutation(len(examples))
        return _numbered(np.split(order, sizes.cumsum()[:-1]))


PARTITIONS: dict[str, type[Partitioner]] = {
    "iid": IID,
    "by_label": ByLabel,
    "shards": Shards,
    "dirichlet": Dirichlet,
    "shepherd_dirichlet": ShepherdDirichlet,
    "by_owner": ByOwner,
    "by_size": BySize,
}


def draw_evenly(examples: Sequence[Example], count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `count` examples, balanced over the categories as far as these allow, and of all the others.

    If no example names a category, they are drawn from all.
    """
    if not 0 < count <= len(examples):
        raise ConfigError(
            f"Expected data.pool between 1 and the {len(examples)} training examples, got {count}."
        )
    if any(e.category for e in examples):
        check_named(examples, "category", "data.pool, as many of each category,")
    pools = [
        pool.tolist()
        for pool in shuffled_pools(examples, "category", rng.numpy_stream(seed, "pool")).values()
    ]
    turns = [pool[turn] for turn in range(max(map(len, pools))) for pool in pools if turn < len(pool)]
    chosen = set(turns[:count])
    return sorted(chosen), [i for i in range(len(examples)) if i not in chosen]


@dataclass(frozen=True)
class Holding:
    """The contents of one client."""

    client: ClientId
    size: int
    counts: Mapping[str, int]  # label -> examples, for every label in the data
    distance: float  # total variation between this client's mix and that of all: 0 same, 1 disjoint


@dataclass(frozen=True)
class PartitionTable:
    totals: Mapping[str, int]  # label -> examples, over all clients
    clients: Sequence[Holding]  # in the order of the parts

    @property
    def distance(self) -> float:
        """Mean over clients, each weighted by its size: 0 is IID."""
        return sum(c.size * c.distance for c in self.clients) / sum(c.size for c in self.clients)


def partition_table(
    examples: Sequence[Example], parts: Mapping[ClientId, Sequence[int]], *, by: Label = "category"
) -> PartitionTable:
    """How many examples of each label every client holds, and how far its mix is from that of all."""
    counts = {client: Counter(group(examples[i], by) for i in part) for client, part in parts.items()}
    totals = sum(counts.values(), Counter[str]())
    everything = totals.total()
    return PartitionTable(
        totals={label: totals[label] for label in sorted(totals)},
        clients=[
            Holding(
                client,
                held.total(),
                {label: held[label] for label in sorted(totals)},
                0.5 * sum(abs(held[c] / held.total() - totals[c] / everything) for c in totals),
            )
            for client, held in counts.items()
        ],
    )


def label(example: Example, by: Label) -> str:
    """The example's label, "" if it names none."""
    return example.category if by == "category" else example.owner


def group(example: Example, by: Label) -> str:
    """The group that an example counts towards in results."""
    return label(example, by) or f"no {by}"


def check_named(examples: Sequence[Example], by: Label, what: str) -> None:
    """Raises ConfigError, which says what to do, unless every example names its label."""
    missing = sum(not label(e, by) for e in examples)
    if missing:
        raise ConfigError(
            f"{missing:,} of {len(examples):,} examples name no {by}; {what} needs one for each. {WAYS_OUT[by]}"
        )


def check_labels(examples: Sequence[Example], by: Label, what: str, *, several: bool = True) -> None:
    """Raises ConfigError unless the labels of a whole data set group it: all named, and not all different.

    With `several` there must be two or more labels, as a split by label needs.
    """
    check_named(examples, by, what)
    values = len({label(e, by) for e in examples})
    if several and values == 1 < len(examples):
        raise ConfigError(
            f"All {len(examples):,} examples have the same {by}; {what} needs two or more. {WAYS_OUT[by]}"
        )
    if values == len(examples) > 1:
        raise ConfigError(
            f"Each of the {len(examples):,} examples has a different {by}, so it groups nothing, and {what} means "
            f"nothing. Is it the right column? {WAYS_OUT[by]}"
        )


def shuffled_pools(
    examples: Sequence[Example], by: Label, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Label -> its indices into `examples`, shuffled; labels in alphabetical order.

    The permutation orders the lookup of labels and does not renumber: an index always means its own example.
    """
    pools: dict[str, list[int]] = {}
    for i in generator.permutation(len(examples)).tolist():
        pools.setdefault(label(examples[i], by), []).append(i)
    return {name: np.array(pools[name]) for name in sorted(pools)}


def _shared_pools(
    examples: Sequence[Example], by: Label, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """`shuffled_pools` for a split by label, which is refused if an example names none."""
    check_named(examples, by, f"a split by {by}")
    return shuffled_pools(examples, by, generator)


def _numbered(parts: Sequence[Any]) -> Parts:
    width = max(3, len(str(len(parts) - 1)))  # ids sort as numbers do
    return {f"client-{k:0{width}d}": sorted(int(i) for i in part) for k, part in enumerate(parts)}


def _check_clients(clients: int | None, examples: Sequence[Example]) -> int:
    if clients is None or clients < 1:
        raise ConfigError(f"Expected at least one client, got {clients=}.")
    if clients > len(examples):
        raise ConfigError(
            f"{len(examples)} examples are too few for {clients} clients: some would hold none."
        )
    return clients


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"Expected a positive, finite alpha, got {alpha=}.")
