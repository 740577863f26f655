"""Every example goes to one client, and the skew is the one that was asked for."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedloom.data.example import Example
from fedloom.data.held_out import hold_out
from fedloom.data.partition import (
    IID,
    PARTITIONS,
    ByLabel,
    ByOwner,
    BySize,
    Dirichlet,
    Shards,
    ShepherdDirichlet,
    check_labels,
    draw_evenly,
    partition_table,
)
from fedloom.errors import ConfigError


def examples(*sizes: int, owners: int = 1) -> list[Example]:
    """One label per size, "a", "b", ...; labels interleaved, as in a shuffled file."""
    labels = [chr(97 + k) for k, size in enumerate(sizes) for _ in range(size)]
    order = sorted(range(len(labels)), key=lambda i: (i * 7919) % 10007)
    return [
        Example(f"instruction {n}", "response", category=labels[i], owner=f"owner {i % owners}")
        for n, i in enumerate(order)
    ]


EIGHT = examples(374, 219, 214, 177, 177, 151, 119, 71)  # Dolly's eight categories, a tenth of each
ALL = [
    IID(),
    ByLabel(),
    ByLabel(2),
    Shards(),
    Dirichlet(0.1),
    Dirichlet(100.0),
    ShepherdDirichlet(min_size=5),
    BySize(log_normal=1.0),
    BySize(power_law=1.0),
    BySize(sizes=tuple(range(1, 11))),
]
by_name = pytest.mark.parametrize("split", ALL, ids=repr)


def labels_of(data: list[Example], parts: dict[str, list[int]]) -> list[Counter[str]]:
    return [Counter(data[i].category for i in part) for part in parts.values()]


def distance(split, seed: int = 0, data: list[Example] = EIGHT, clients: int = 10) -> float:
    return partition_table(data, split(data, clients, seed)).distance


@by_name
def test_every_index_is_used_exactly_once(split):
    assert sorted(chain.from_iterable(split(EIGHT, 10, 0).values())) == list(range(len(EIGHT)))


@by_name
def test_the_same_seed_gives_the_same_split(split):
    assert split(EIGHT, 10, 3) == split(EIGHT, 10, 3)


@by_name
def test_another_seed_gives_another_split(split):
    assert split(EIGHT, 10, 3) != split(EIGHT, 10, 4)


@by_name
def test_clients_come_in_the_order_of_their_ids_and_indices_ascend(split):
    parts = split(EIGHT, 10, 0)
    assert list(parts) == [f"client-{k:03d}" for k in range(10)]
    assert all(part == sorted(part) for part in parts.values())


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    split=st.sampled_from(
        [
            IID(),
            ByLabel(),
            ByLabel(3),
            Shards(),
            Shards(1),
            Dirichlet(1e-3),
            Dirichlet(1.0),
            ShepherdDirichlet(min_size=1, alpha=0.01, tries=20),
            ShepherdDirichlet(min_size=1, tries=20),
            BySize(log_normal=3.0),
            BySize(power_law=2.0),
        ]
    ),
)
@example(sizes=[28, 18], clients=4, seed=49, split=Dirichlet(1e-3))  # mixes of denormal numbers
@settings(deadline=None, max_examples=300)
def test_any_split_uses_every_index_once_and_leaves_nobody_empty_or_is_refused(sizes, clients, seed, split):
    data = examples(*sizes)
    try:
        parts = split(data, clients, seed)
    except ConfigError:
        return
    assert len(parts) == clients
    assert all(parts.values())
    assert sorted(chain.from_iterable(parts.values())) == list(range(len(data)))


def test_more_clients_than_examples_are_refused():
    with pytest.raises(ConfigError, match="3 examples are too few for 4 clients"):
        IID()(examples(3), 4, 0)


def test_iid_sizes_differ_by_at_most_one():
    sizes = {len(part) for part in IID()(examples(50, 53), 10, 0).values()}
    assert sizes == {10, 11}  # 103 = 7 * 10 + 3 * 11


def test_ids_are_as_wide_as_a_thousand_clients_need():
    parts = IID()(examples(2000), 1500, 0)
    assert list(parts) == sorted(parts)
    assert "client-0000" in parts


@pytest.mark.parametrize("labels", [1, 2, 3, 8])
def test_by_label_gives_each_client_exactly_so_many_labels(labels):
    assert {len(c) for c in labels_of(EIGHT, ByLabel(labels)(EIGHT, 16, 0))} == {labels}


def test_by_label_gives_large_labels_more_clients():
    parts = ByLabel()(examples(60, 30, 10), 10, 0)
    assert sorted(len(part) for part in parts.values()) == [10] * 10  # 6 + 3 + 1 clients


def test_by_label_says_how_many_labels_a_client_needs_for_every_label_to_have_an_owner():
    with pytest.raises(ConfigError, match="set labels_per_client to 3 or more"):
        ByLabel(2)(EIGHT, 3, 0)  # 3 * 2 < 8 labels; ceil(8 / 3) = 3


def test_by_label_refuses_more_labels_than_there_are():
    with pytest.raises(ConfigError, match="between 1 and the 2 different values"):
        ByLabel(3)(examples(5, 5), 5, 0)


def test_shards_give_about_two_labels_a_client():
    counts = [len(c) for c in labels_of(EIGHT, Shards()(EIGHT, 50, 0))]
    assert 1.7 < sum(counts) / 50 < 2.5
    assert max(counts) <= 4


def test_more_shards_than_examples_are_refused():
    with pytest.raises(ConfigError, match=r"per_client between 1 and 1 \(3 examples / 3 clients\), got 2"):
        Shards()(examples(3), 3, 0)


def test_shards_are_equal_in_size():
    sizes = [len(part) for part in Shards()(EIGHT, 10, 0).values()]
    assert max(sizes) - min(sizes) <= 2  # each of the two shards may be one longer


@pytest.mark.parametrize("kind", [Dirichlet, lambda alpha: ShepherdDirichlet(alpha, min_size=1)])
def test_label_skew_grows_as_alpha_falls(kind):
    def skew(alpha: float) -> float:
        return sum(distance(kind(alpha), seed) for seed in range(5)) / 5

    assert skew(0.05) > skew(0.3) > skew(2.0) > skew(100.0)


def test_the_largest_label_of_a_client_is_most_of_it_at_a_small_alpha():
    """Indices of a permuted array, used on the unpermuted data, look IID at any alpha: a published bug."""

    def share(alpha: float) -> float:
        held = labels_of(EIGHT, Dirichlet(alpha)(EIGHT, 10, 0))
        return sum(max(c.values()) / c.total() for c in held) / len(held)

    assert share(0.05) > 0.6
    assert share(1000.0) < 0.3


def test_a_large_alpha_is_as_even_as_iid():
    assert distance(Dirichlet(1e4)) < 1.5 * distance(IID())


def test_dirichlet_sizes_differ_by_at_most_one():
    assert {len(p) for p in Dirichlet(0.1)(EIGHT, 7, 0).values()} <= {1502 // 7, 1502 // 7 + 1}


def test_dirichlet_can_split_on_the_owner():
    data = examples(100, 100, owners=4)
    table = partition_table(data, Dirichlet(0.05, by="owner")(data, 4, 0), by="owner")
    assert table.distance > 0.5


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha_is_refused(alpha):
    for kind in (Dirichlet, ShepherdDirichlet):
        with pytest.raises(ConfigError, match="alpha"):
            kind(alpha)(EIGHT, 2, 0)


def test_shepherd_gives_everybody_at_least_the_minimum():
    for seed in range(10):
        parts = ShepherdDirichlet(0.3, min_size=60)(EIGHT, 10, seed)
        assert min(len(part) for part in parts.values()) >= 60


def test_shepherd_without_a_minimum_leaves_clients_smaller_than_that():
    smallest = [
        min(len(part) for part in ShepherdDirichlet(0.3, min_size=1)(EIGHT, 10, seed).values())
        for seed in range(10)
    ]
    assert min(smallest) < 60


def test_shepherd_gives_no_more_to_a_client_that_has_its_fair_share():
    labels = examples(*[10] * 20)
    for seed in range(5):
        sizes = [len(part) for part in ShepherdDirichlet(0.1, min_size=1)(labels, 4, seed).values()]
        assert max(sizes) < 60  # 200 / 4 = 50 is fair; one label of 10 may carry a client past it


def test_shepherd_gives_up_after_its_tries_and_says_how_close_it_came():
    with pytest.raises(ConfigError, match=r"in 5 draws .* 10 clients 150 examples \(the best left one with"):
        ShepherdDirichlet(0.1, min_size=150, tries=5)(EIGHT, 10, 0)


def test_shepherd_refuses_a_minimum_that_the_data_cannot_give():
    with pytest.raises(ConfigError, match=r"between 1 and 15 \(1502 examples / 100 clients\), got 40"):
        ShepherdDirichlet()(EIGHT, 100, 0)


def test_by_owner_makes_one_client_of_each_owner_under_its_name():
    data = examples(10, 20, owners=3)
    parts = ByOwner()(data, None, 0)
    assert list(parts) == ["owner 0", "owner 1", "owner 2"]
    assert all(data[i].owner == name for name, part in parts.items() for i in part)


def test_by_owner_refuses_examples_without_an_owner():
    with pytest.raises(ConfigError, match="1 of 2 examples name no owner; a split by owner"):
        ByOwner()([Example("a", "b", owner="x"), Example("a", "b")], None, 0)


def test_by_owner_refuses_another_number_of_clients():
    with pytest.raises(ConfigError, match="3 owners, got clients=2"):
        ByOwner()(examples(10, owners=3), 2, 0)


def test_sizes_are_relative():
    parts = BySize(sizes=(3, 1, 1))(examples(100), 3, 0)
    assert [len(p) for p in parts.values()] == [60, 20, 20]


def test_nobody_is_empty_however_small_a_share():
    assert [len(p) for p in BySize(sizes=(1e9, 1, 1))(examples(10), 3, 0).values()] == [8, 1, 1]


def test_a_power_law_falls_with_the_client():
    sizes = [len(p) for p in BySize(power_law=1.0)(examples(1100), 3, 0).values()]
    assert sizes == [600, 300, 200]  # 1100 * (1, 1/2, 1/3) / (11/6)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (BySize(), "exactly one"),
        (BySize(sizes=(1,), power_law=1.0), "exactly one"),
        (BySize(sizes=(1, 1)), "each of 3 clients, got 2"),
        (BySize(sizes=(1, 0, 1)), "positive"),
        (BySize(sizes=(1, float("nan"), 1)), "positive"),
        (BySize(log_normal=1e9), "positive"),
    ],
)
def test_impossible_sizes_are_refused(split, message):
    with pytest.raises(ConfigError, match=message):
        split(examples(10), 3, 0)


def test_hold_out_takes_so_many_of_each_category():
    train, test = hold_out(EIGHT, per_category=10, seed=0)
    assert Counter(EIGHT[i].category for i in test) == dict.fromkeys("abcdefgh", 10)
    assert sorted(train + test) == list(range(len(EIGHT)))


def test_hold_out_takes_at_most_half_of_a_small_category():
    data = examples(100, 7, 1)
    _, test = hold_out(data, per_category=10, seed=0)
    assert Counter(data[i].category for i in test) == {"a": 10, "b": 3}  # 7 // 2 = 3, 1 // 2 = 0


def test_hold_out_never_tests_on_a_prompt_that_is_trained_on():
    data = [Example("twice", f"answer {i}") for i in range(2)] + [Example(f"q{i}", "a") for i in range(8)]
    for seed in range(10):
        _, test = hold_out(data, per_category=5, seed=seed)
        assert len(test) == 5
        assert all(data[i].instruction != "twice" for i in test)


ALONG_LABELS = [ByLabel(), Shards(), Dirichlet(), ShepherdDirichlet(min_size=1)]


@pytest.mark.parametrize("split", ALONG_LABELS, ids=repr)
@pytest.mark.parametrize(
    ("blank", "message"), [(40, "40 of 40 examples name no category"), (7, "7 of 40 examples")]
)
def test_a_missing_category_is_no_category_to_split_along(split, blank, message):
    data = [Example(f"q{i}", "a", category="" if i < blank else "ab"[i % 2]) for i in range(40)]
    with pytest.raises(ConfigError, match=message) as caught:
        split(data, 4, 0)
    assert "data.clusters = { count = 8 }" in str(caught.value)
    assert 'data.columns = { category = "..." }' in str(caught.value)


def test_a_split_along_owners_needs_owners_and_names_the_ways_to_them():
    with pytest.raises(ConfigError, match=r"40 of 40 examples name no owner") as caught:
        Dirichlet(by="owner")([Example(f"q{i}", "a", category="ab"[i % 2]) for i in range(40)], 4, 0)
    assert 'data.owner = "file"' in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 6, "All 6 examples have the same category"),
        (list("abcdef"), "Each of the 6 examples has a different category"),
    ],
)
def test_labels_that_group_nothing_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        check_labels([Example("q", "a", category=c) for c in labels], "category", "a split")


@pytest.mark.parametrize("split", [IID(), BySize(power_law=1.0)], ids=repr)
def test_splits_that_look_at_no_label_need_none(split):
    data = [Example(f"q{i}", "a") for i in range(40)]
    assert sum(map(len, split(data, 4, 0).values())) == 40


def test_hold_out_draws_from_all_where_nobody_names_a_category():
    train, test = hold_out([Example(f"q{i}", "a") for i in range(40)], per_category=10)
    assert (len(train), len(test)) == (30, 10)


def test_hold_out_of_each_category_refuses_data_that_lacks_some():
    data = [Example(f"q{i}", "a", category="" if i < 3 else "x") for i in range(40)]
    with pytest.raises(
        ConfigError, match="3 of 40 examples name no category; holding out examples of each category"
    ):
        hold_out(data)
    with pytest.raises(ConfigError, match=r"3 of 40 examples name no category; data\.pool"):
        draw_evenly(data, 8, seed=0)


def test_hold_out_of_each_owner_refuses_data_without_owners():
    with pytest.raises(ConfigError, match="40 of 40 examples name no owner"):
        hold_out([Example(f"q{i}", "a", category="x") for i in range(40)], by="owner")


def test_hold_out_never_takes_an_owners_last_example():
    sizes = [1, 1, 1, 2, 2, 5, 40]
    owners = [f"owner {k}" for k, size in enumerate(sizes) for _ in range(size)]
    data = [Example(f"q{i}", "a", category="ab"[i % 2], owner=owner) for i, owner in enumerate(owners)]
    for seed in range(20):
        train, test = hold_out(data, per_category=20, seed=seed, keep_owners=True)
        assert {data[i].owner for i in train} == set(owners)
        assert Counter(data[i].category for i in test) == {"a": 13, "b": 13}  # half of 26, others instead


def test_the_table_counts_what_has_no_category_under_a_name_that_says_so():
    table = partition_table([Example("i", "r")] * 2, {"x": [0], "y": [1]})
    assert table.totals == {"no category": 2}


def test_hold_out_depends_on_its_seed_alone():
    assert hold_out(EIGHT, seed=1) == hold_out(EIGHT, seed=1) != hold_out(EIGHT, seed=2)


def test_the_table_counts_labels_and_measures_the_distance_from_the_whole():
    data = [Example("i", "r", category=c) for c in "aaabbb"]
    table = partition_table(data, {"x": [0, 1, 2, 3], "y": [4, 5]})
    x, y = table.clients
    assert table.totals == {"a": 3, "b": 3}
    assert (x.size, x.counts, y.counts) == (4, {"a": 3, "b": 1}, {"a": 0, "b": 2})
    assert x.distance == 0.25  # 0.5 * (|3/4 - 1/2| + |1/4 - 1/2|)
    assert y.distance == 0.5  # 0.5 * (|0 - 1/2| + |1 - 1/2|)
    assert table.distance == pytest.approx(1 / 3)  # (4 * 0.25 + 2 * 0.5) / 6


def test_every_split_has_a_name():
    kinds = {type(split) for split in ALL} | {ByOwner}
    assert set(PARTITIONS.values()) == kinds
