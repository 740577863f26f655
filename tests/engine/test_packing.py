from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import LOCAL, VOCABULARY, engine, example, examples, llama, moved, norms_in_double

from fedloom.engine.attention import Blocks
from fedloom.engine.bank import AdapterBank, Tuning
from fedloom.engine.forward import PackedModel
from fedloom.engine.layers import ActivePass, inject
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Encoded, Encoder, Item, pack, split
from fedloom.engine.planner import Plan
from fedloom.errors import DataError
from fedloom.steps import Fit, LoraSpec, Tokens

CPU = torch.device("cpu")


def items(*lengths_of_rows: tuple[int, int]) -> list[Item]:
    return [Item(row, Encoded.of(example(n + 1, seed))) for seed, (row, n) in enumerate(lengths_of_rows)]


def sizes(parts) -> list[list[int]]:
    return [[len(item.example.ids) for _, item in part] for part in parts]


def setup(dtype=torch.float64, rows: int = 2):
    model = llama(dtype)
    layout = AdapterLayout.of(model, LoraSpec(rank=4))
    active = ActivePass()
    inject(model, layout, active)
    adapters = [moved(layout, dtype, seed) for seed in range(rows)]
    bank = AdapterBank(layout, [Tuning(a) for a in adapters], dtype=dtype, device=CPU, training=True)
    return PackedModel(model, active, Plan(4096, 8, "highest"), checkpointing=False), bank


def test_passes_are_filled_in_order_up_to_the_budget():
    parts = list(split(items((0, 4), (0, 5), (1, 2), (1, 9)), 10))
    assert sizes(parts) == [[4, 5], [2], [9]]
    assert [[number for number, _ in part] for part in parts] == [[0, 1], [2], [3]]


def test_an_example_longer_than_the_budget_runs_alone():
    assert sizes(split(items((0, 4), (0, 30), (0, 4)), 10)) == [[4], [30], [4]]


def test_isolated_passes_never_hold_two_rows():
    assert sizes(split(items((0, 2), (0, 2), (1, 2), (0, 2)), 100, isolated=True)) == [[2, 2], [2], [2]]


def test_an_example_without_labels_takes_no_room():
    silent = Item(0, Encoded.of(example(9, 0, labelled=0)))
    assert sizes(split([silent, *items((0, 3)), silent], 10)) == [[3]]


def test_targets_are_the_labelled_tokens_and_stand_before_them():
    tokens = Tokens((7, 8, 9, 10, 11), (False, False, True, False, True))
    encoded = Encoded.of(tokens)
    assert encoded.at.tolist() == [1, 3]
    assert encoded.targets.tolist() == [9, 11]
    assert encoded.ids.tolist() == [7, 8, 9, 10]


def test_what_follows_the_last_label_is_cut():
    tokens = Tokens((7, 8, 9, 10, 11), (False, True, False, False, False))
    assert Encoded.of(tokens).ids.tolist() == [7]


def test_no_target_crosses_from_one_example_to_the_next():
    _, bank = setup()
    first, second = Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))
    two = [Item(0, Encoded.of(first)), Item(1, Encoded.of(second))]
    packed = pack(list(enumerate(two)), bank, multiple=4, dtype=torch.float64)
    assert packed.ids.tolist() == [[5, 6, 8, 0]]
    assert packed.positions.tolist() == [[0, 1, 0, 0]]
    assert packed.lora.owner.tolist() == [0, 0, 1, -1]
    assert packed.label_at[packed.label_of].tolist() == [0, 1, 2]
    assert packed.targets[packed.label_of].tolist() == [6, 7, 9]
    assert packed.label_item.tolist() == [0, 0, 1]
    assert packed.weights[len(packed.label_of) :].sum() == 0.0


def test_padding_moves_neither_loss_nor_gradient():
    with norms_in_double():
        packed, bank = setup()
        batch = [replace(item, weight=0.1) for item in items((0, 11), (1, 17), (1, 5))]
        results = []
        for multiple in (1, 64, 256):
            packed.plan = replace(packed.plan, multiple=multiple)
            results.append((packed.losses(batch, bank), bank.grads.clone()))
        for losses, grads in results[1:]:
            assert torch.allclose(losses, results[0][0], atol=1e-12)
            assert torch.allclose(grads, results[0][1], atol=1e-12)


def test_a_neighbours_tokens_move_not_one_bit_of_loss_or_gradient():
    packed, bank = setup(torch.float32)
    ours = items((0, 11))
    neighbours = [Item(1, Encoded.of(example(18, seed))) for seed in (71, 72)]
    results = []
    for neighbour in neighbours:
        batch = [replace(item, weight=0.1) for item in (*ours, neighbour, *items((1, 5)))]
        losses = packed.losses(batch, bank)
        results.append((float(losses[0]), bank.grads[0].clone(), float(losses[1])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] != results[1][2]


def test_gradients_are_those_of_the_last_call_alone():
    packed, bank = setup()
    batch = [replace(item, weight=0.1) for item in items((0, 11))]
    packed.losses(batch, bank)
    first = bank.grads.clone()
    packed.losses(batch, bank)
    assert torch.equal(bank.grads, first)
    assert not bank.grads[1].any()


def test_a_pass_records_what_each_layer_asked_of_attention():
    packed, bank = setup()
    [batch] = split(items((0, 5)), 100)
    laid = pack(batch, bank, multiple=8, dtype=torch.float64)
    blocks = Blocks(laid.lengths)
    with packed.own_attention():
        packed.hidden(laid, blocks)
    assert blocks.windows == [None, None]  # two layers, no window


def test_each_example_is_encoded_once_in_the_life_of_the_engine():
    calls: list[int] = []
    texts = [f"example {i}" for i in range(5)]

    def encode(text: str) -> Tokens:
        calls.append(texts.index(text))
        return example(9, calls[-1])

    trained = engine(llama(), encode=encode)
    for _ in range(3):
        trained.answer(
            {0: Fit(moved(trained.layout), texts, LOCAL), 1: Fit(moved(trained.layout), texts[:2], LOCAL)}
        )
    assert sorted(calls) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (Tokens((3, 4), (True, True)), "first token"),
        (Tokens((3, VOCABULARY), (False, True)), f"{VOCABULARY} embeddings"),
        (Tokens((3, -1), (False, True)), "outside"),
        (Tokens((3, 4), (False,)), "label flag"),
        (Tokens((3,) * 66, (False,) + (True,) * 65), "65 tokens, the model reads 64"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(tokens, message):
    encode = Encoder(lambda tokens: tokens, vocabulary=VOCABULARY, longest=64)
    with pytest.raises(DataError, match=message):
        encode(tokens)


def test_examples_of_the_longest_length_train():
    trained = engine(llama(max_position_embeddings=64))
    assert (
        trained.answer({0: Fit(moved(trained.layout), [*examples(1), example(65, 0)], LOCAL)})[0].steps == 1
    )


def test_examples_are_encoded_once_while_in_use_and_the_others_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Encoder, "KEPT", 2)
    asked: list[str] = []

    def spell(text: str) -> Tokens:
        asked.append(text)
        return Tokens((1, 2), (False, True))

    encode = Encoder(spell, vocabulary=VOCABULARY, longest=64)
    a, b, c = "one", "two", "three"
    for text in (a, b, a, c, a, b):  # at c, b is the one not asked for longest
        encode(text)
    assert asked == [a, b, c, b]
