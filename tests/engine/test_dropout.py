from __future__ import annotations

import pytest
import torch
from tiny_models import LOCAL, distance, engine, examples, llama, moved, norms_in_double

from fedloom import rng
from fedloom.engine.dropout import Dropout, token_keys
from fedloom.steps import Fit, LocalTraining, LoraSpec

LORA = LoraSpec(rank=4, alpha=8.0, dropout=0.3)


def mask(*, stream=("a",), position=0, length=400, module="q", seed=0, features=300, rate=0.3):
    return Dropout(rate, seed, token_keys(seed, stream, position, length)).keep(module, features)


def agreement(one, other) -> float:
    return float((one == other).double().mean())


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_share_kept_is_one_minus_the_rate(rate):
    kept = mask(rate=rate).double()  # 120,000 draws: standard error of the mean below 0.0015
    assert abs(float(kept.mean()) - (1 - rate)) < 0.006
    assert float((kept.mean(0) - (1 - rate)).abs().max()) < 6 * (rate * (1 - rate) / 400) ** 0.5  # by feature
    assert float((kept.mean(1) - (1 - rate)).abs().max()) < 6 * (rate * (1 - rate) / 300) ** 0.5  # by token


@pytest.mark.parametrize(
    "other", [{"stream": ("b",)}, {"position": 1}, {"module": "k"}, {"seed": 1}], ids=lambda o: next(iter(o))
)
def test_masks_of_another_name_are_independent(other):
    expected = 0.7**2 + 0.3**2  # two independent masks agree where both keep or both drop
    assert abs(agreement(mask(), mask(**other)) - expected) < 0.01


def test_neighbouring_tokens_and_features_are_independent():
    kept = mask()
    assert abs(agreement(kept[1:], kept[:-1]) - 0.58) < 0.01  # 0.7^2 + 0.3^2
    assert abs(agreement(kept[:, 1:], kept[:, :-1]) - 0.58) < 0.01


def test_a_token_keeps_its_mask_whatever_it_is_packed_with():
    keys = token_keys(0, ("a",), 0, 400)
    assert torch.equal(
        Dropout(0.3, 0, keys[100:200]).keep("q", 5000), Dropout(0.3, 0, keys).keep("q", 5000)[100:200]
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_masks_are_those_of_exact_arithmetic_on_every_device(device, monkeypatch):
    monkeypatch.setattr("fedloom.engine.dropout._CHUNK", {device: 70})  # several parts, the last one shorter

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    keys = token_keys(0, ("a",), 0, 11)
    salt = rng.key(5, "dropout module", "q") % 2**32
    exact = [
        [mixed((mixed(key ^ salt) + f * 0x9E3779B1) % 2**32) >= int(0.3 * 2**32) for f in range(30)]
        for key in keys.tolist()
    ]
    assert Dropout(0.3, 5, keys.to(device)).keep("q", 30).tolist() == exact


def test_dropout_leaves_the_mean_of_the_input():
    dropout = Dropout(0.3, 0, token_keys(0, ("a",), 0, 2000))
    assert float((dropout.keep("q", 50) * dropout.gain).mean()) == pytest.approx(1.0, abs=0.01)


def test_dropout_masks_do_not_depend_on_who_shares_the_pass():
    with norms_in_double():
        fast = engine(llama(torch.float64), lora=LORA, path="fast", tokens_per_pass=130)
        adapter = moved(fast.layout, torch.float64)
        jobs = {k: Fit(adapter, examples(4 + 3 * k, k), LOCAL, stream=(k,), seen=k) for k in range(3)}
        together = fast.answer(jobs)
        for key, job in jobs.items():
            assert distance(together[key].adapter, fast.answer({key: job})[key].adapter) < 1e-12


def test_dropout_training_equals_peft_with_the_same_masks():
    with norms_in_double():
        model = llama(torch.float64)
        fast, slow = engine(model, lora=LORA, path="fast"), engine(model, lora=LORA, path="reference")
        job = {0: Fit(moved(fast.layout, torch.float64), examples(9), LOCAL, stream=("c",), seen=5)}
        one, other = fast.answer(job)[0], slow.answer(job)[0]
    assert distance(one.adapter, other.adapter) < 1e-10
    assert one.loss == pytest.approx(other.loss, rel=1e-12)


def test_dropout_changes_what_is_learnt():
    model = llama()
    with_dropout, without = engine(model, lora=LORA), engine(model)
    job = {0: Fit(moved(without.layout), examples(8), LOCAL)}
    assert distance(with_dropout.answer(job)[0].adapter, without.answer(job)[0].adapter) > 1e-4


def test_dropout_is_off_when_scoring():
    from fedloom.steps import Score

    model = llama()
    score = {0: Score(examples(3), moved(engine(model).layout))}
    assert engine(model, lora=LORA).answer(score) == engine(model).answer(score)


def test_each_epoch_draws_new_masks():
    local = LocalTraining(batch_size=1, optimizer="sgd", learning_rate=1.0, clip=0.0)
    trained = engine(llama(), lora=LORA)
    start, [one] = moved(trained.layout), examples(1)
    first, second = (
        trained.answer({0: Fit(start, [one], local, seen=seen, limit=1)})[0].adapter for seen in (0, 1)
    )
    assert distance(first, second) > 1e-4
