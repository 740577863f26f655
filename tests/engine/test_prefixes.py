"""Examples that begin alike share their beginning, and nothing but the work changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_packing import setup
from tiny_models import VOCABULARY, norms_in_double

from fedloom.engine import packing
from fedloom.engine.packing import Encoded, Item, pack
from fedloom.engine.prefixes import LONG_ENOUGH, shared_prefixes
from fedloom.steps import Tokens

LONG = LONG_ENOUGH
ONE, TWO = list(range(LONG)), [99, *range(LONG)]


def test_examples_of_two_templates_share_two_prefixes():
    examples = [[*ONE, 50, 51], [*TWO, 50], [*ONE, 60], [*TWO, 61, 62], [1, 2, 3]]
    assert shared_prefixes(examples) == [(LONG, [0, 2]), (LONG + 1, [1, 3]), (0, [4])]


def test_a_short_beginning_is_not_worth_it():
    assert shared_prefixes([[*ONE[:-1], 50], [*ONE[:-1], 60]]) == [(0, [0]), (0, [1])]


def test_most_tokens_are_saved():
    """Two pairs with the same template: apart they save 2 * 40, together 3 * 16; with a fifth example still."""
    pairs = [[*ONE, *(mark,) * 24, end] for mark in (70, 80) for end in (1, 2)]
    assert shared_prefixes(pairs) == [(LONG + 24, [0, 1]), (LONG + 24, [2, 3])]
    many = [*pairs[:2], *([*ONE, end] for end in range(30, 36))]
    assert shared_prefixes(many) == [(LONG, list(range(8)))]


def test_equal_examples_keep_a_token_each():
    assert shared_prefixes([[*ONE, 7]] * 3) == [(LONG, [0, 1, 2])]
    assert shared_prefixes([]) == []


def beginning_alike(*, all_labelled: bool) -> list[Item]:
    """Two rows; in each two templates, one example that is another's twin, one that shares nothing."""
    stream = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=stream).tolist()

    templates = [draw(LONG + 3), draw(LONG + 9)]
    texts = [templates[i % 2] + draw(3 + 2 * i) for i in range(5)]
    texts += [texts[2], draw(9)]
    items = []
    for row in (1, 0):
        for ids in texts:
            labelled = [i > 0 and (all_labelled or i >= len(ids) - 4) for i in range(len(ids))]
            items.append(
                Item(row, Encoded.of(Tokens(tuple(ids), tuple(labelled))), weight=0.01 * (len(items) + 1))
            )
    return items


@pytest.mark.parametrize("all_labelled", [True, False])
def test_sharing_changes_neither_losses_nor_gradients(all_labelled, monkeypatch):
    packed, bank = setup()
    items = beginning_alike(all_labelled=all_labelled)
    with norms_in_double():
        together = packed.losses(items, bank), bank.grads.clone()
        monkeypatch.setattr(
            packing, "shared_prefixes", lambda examples: [(0, [i]) for i in range(len(examples))]
        )
        apart = packed.losses(items, bank), bank.grads.clone()
    assert torch.allclose(together[0], apart[0], atol=1e-11, rtol=1e-11)
    assert torch.allclose(together[1], apart[1], atol=1e-11, rtol=1e-9)
    assert apart[1].abs().max() > 1e-3


def test_what_is_shared_runs_once_and_counts_as_often_as_it_is_used():
    _, bank = setup()
    items = beginning_alike(all_labelled=True)
    laid = pack(list(enumerate(items)), bank, multiple=1, dtype=torch.float64)
    saved = 2 * (3 * (LONG + 3) + LONG + 9)  # a row has four examples of one template, two of the other
    assert laid.ids.shape[1] == sum(len(item.example.ids) for item in items) - saved
    assert (
        len(set(laid.label_of.tolist())) < len(laid.label_of) == sum(len(item.example.at) for item in items)
    )
    weight = sum(item.weight * len(item.example.at) for item in items)
    assert float(laid.weights.sum()) == pytest.approx(weight)


def test_nothing_is_shared_between_rows_or_under_dropout():
    _, bank = setup()
    example = Encoded.of(Tokens(tuple(range(30)), (False,) + (True,) * 29))
    apart = [Item(0, example), Item(1, example)]
    assert pack(list(enumerate(apart)), bank, multiple=1, dtype=torch.float64).lengths == (29, 29)
    alike = [Item(0, example), Item(0, example)]
    assert pack(list(enumerate(alike)), bank, multiple=1, dtype=torch.float64).lengths == (28, 1, 1)
    keyed = [replace(item, keys=torch.arange(29)) for item in alike]
    laid = pack(list(enumerate(keyed)), bank, multiple=1, dtype=torch.float64, dropout=(0.1, 0))
    assert laid.lengths == (29, 29)
