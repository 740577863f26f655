"""Rows of one pass may differ in rank, scale, trained factors and frozen factors: each equals itself alone, and PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    distance,
    engine,
    example,
    examples,
    llama,
    moved,
    norms_in_double,
    plain_peft,
    train_by_hand,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom import lora
from fedloom.engine import fitting
from fedloom.engine.bank import AdapterBank, Tuning
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import ShapeMismatch
from fedloom.state import AdapterState
from fedloom.steps import Correction, Factors, Fit, Frozen, Generate, LocalTraining, LoraSpec, Score

WIDE = LoraSpec(rank=16, alpha=32.0)
NARROW = LoraSpec(rank=4, alpha=32.0)
ADAMW = LocalTraining(batch_size=4, learning_rate=3e-3, weight_decay=0.1, epochs=2)
SGD = LocalTraining(batch_size=4, learning_rate=0.3, optimizer="sgd", clip=0.0)
PATHS = pytest.mark.parametrize("path", ["fast", "reference"])
WAYS = pytest.mark.parametrize("way", ["masked", "segments"], indirect=True)


@pytest.fixture
def way(request, monkeypatch):
    """How the fast path multiplies each token with its own row's factors."""
    if request.param == "segments":
        monkeypatch.setattr("fedloom.engine.packing.DENSE_COLUMNS", 0)
    return request.param


def model():
    return llama(torch.float64)


def adapter(spec: LoraSpec, seed: int = 0) -> AdapterState:
    return moved(AdapterLayout.of(model(), spec), torch.float64, seed=seed)


def fit(start: AdapterState, seed: int = 0, local: LocalTraining = ADAMW, **options) -> Fit:
    return Fit(start, examples(7 + 3 * seed, seed), local, stream=(f"c{seed}",), **options)


def frozen(rank: int = 5, seed: int = 9, scale: float = 0.7) -> Frozen:
    """Of half the targets only."""
    factors = lora.pairs(adapter(LoraSpec(rank=rank), seed))
    return Frozen(lora.state_of({t: pair for i, (t, pair) in enumerate(factors.items()) if i % 2}), scale)


def merged(base, under: Frozen):
    """A base model with frozen factors added into its weights."""
    whole = copy.deepcopy(base)
    for target, (a, b) in lora.pairs(under.factors).items():
        module = whole.get_submodule(target.removeprefix(lora.ON_DISK))
        module.weight.data += under.scale * b @ a
    return whole


# Rank and scale


@PATHS
@WAYS
def test_a_job_of_low_rank_beside_a_wide_one_equals_peft_of_its_rank_under_weight_decay(path, way):
    with norms_in_double():
        base = model()
        trained = engine(base, lora=WIDE, path=path)
        low = fit(adapter(NARROW, 1), 1, scale=NARROW.scale)
        answers = trained.answer({"wide": fit(adapter(WIDE)), "low": low})
        alone = engine(base, lora=NARROW, path=path).answer({0: replace(low, scale=None)})[0]
        by_hand = train_by_hand(plain_peft(base, NARROW), low)
    assert distance(low.adapter, by_hand) > 1e-3
    assert distance(answers["low"].adapter, by_hand) < 1e-10
    assert distance(answers["low"].adapter, alone.adapter) < 1e-10


def test_what_a_low_rank_is_filled_up_with_stays_zero_to_the_bit(monkeypatch):
    kept: list[AdapterBank] = []
    monkeypatch.setattr(
        fitting, "AdapterBank", lambda *args, **how: kept.append(AdapterBank(*args, **how)) or kept[-1]
    )
    trained = engine(model(), lora=WIDE, path="fast")
    trained.answer({"wide": fit(adapter(WIDE)), "low": fit(adapter(NARROW, 1), 1)})
    [bank] = [bank for bank in kept if bank.grads is not None]
    for target in trained.layout:
        assert not target.a(bank.params[1])[NARROW.rank :].any()
        assert not target.b(bank.params[1])[:, NARROW.rank :].any()


@PATHS
def test_every_target_may_have_a_rank_of_its_own(path):
    ranks = [1 + i % 4 for i in range(len(lora.pairs(adapter(WIDE))))]
    start = lora.state_of(
        {
            target: lora.Pair(a[:r], b[:, :r])
            for r, (target, (a, b)) in zip(ranks, lora.pairs(adapter(WIDE)).items(), strict=True)
        }
    )
    after = engine(model(), lora=WIDE, path=path).answer({0: fit(start)})[0].adapter
    assert [pair.rank for pair in lora.pairs(after).values()] == ranks
    assert distance(after, start) > 1e-3


def test_a_rank_above_the_engines_is_refused_with_both():
    with pytest.raises(ShapeMismatch, match=r"expected \(4, 32\) or a lower rank, got \(16, 32\)"):
        engine(model(), lora=NARROW).answer({0: fit(adapter(WIDE))})


def test_a_correction_of_another_rank_than_the_adapter_is_refused():
    job = fit(adapter(NARROW), correction=Correction(offset=adapter(WIDE)))
    with pytest.raises(ShapeMismatch, match=r"\(4, 48\) vs \(16, 48\)"):
        engine(model(), lora=WIDE).answer({0: job})


@PATHS
@WAYS
def test_each_row_has_its_own_scale(path, way):
    with norms_in_double():
        base = model()
        jobs = {s: fit(adapter(NARROW, i), i, scale=s) for i, s in enumerate((0.5, 2.0, 7.0))}
        answers = engine(base, lora=NARROW, path=path).answer(jobs)
        for scale, job in jobs.items():
            peft = plain_peft(base, replace(NARROW, alpha=scale * NARROW.rank))
            assert distance(answers[scale].adapter, train_by_hand(peft, job)) < 1e-10


# Trained factors


@PATHS
@WAYS
@pytest.mark.parametrize("train", ["A", "B"])
@pytest.mark.parametrize("local", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_one_factor_is_trained_as_by_peft_and_the_other_stays_to_the_bit(path, way, train, local):
    with norms_in_double():
        base, start = model(), adapter(NARROW)
        job = fit(start, local=local, train=train, correction=Correction(anchor=adapter(NARROW, 3), mu=0.1))
        after = engine(base, lora=NARROW, path=path).answer({0: job})[0].adapter
        expected = train_by_hand(plain_peft(base, NARROW), job)
    still = "A" if train == "B" else "B"
    for name in lora.only(start, still):
        assert torch.equal(after[name], start[name])
    trained, known = lora.only(after, train), lora.only(expected, train)
    assert distance(trained, lora.only(start, train)) > 1e-3
    assert distance(trained, known) < 1e-10


class Multiplications(TorchDispatchMode):
    """How many numbers are multiplied in matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            one, other = args[-2:]
            self.count += one.shape[0] * one.shape[1] * other.shape[1]
        return func(*args, **(kwargs or {}))


def multiplications(train: Factors) -> int:
    """Of a fit of one step in one pass of 128 tokens, padding included."""
    trained = engine(llama(), lora=NARROW, path="fast")
    trained.served.packed.plan = replace(trained.served.packed.plan, multiple=128)
    job = Fit(moved(trained.layout), examples(3), replace(ADAMW, epochs=1), train=train)
    with Multiplications() as counted:
        trained.answer({0: job})
    return counted.count


def test_a_gradient_costs_nothing_where_its_factor_is_not_trained():
    tokens, rank, targets = 128, NARROW.rank, list(AdapterLayout.of(llama(), NARROW))
    first = [t for t in targets if t.name.startswith("model.layers.0.self_attn") and "o_proj" not in t.name]
    both, only_a, only_b = (multiplications(train) for train in ("AB", "A", "B"))
    assert both - only_a == tokens * rank * sum(t.outputs for t in targets)  # dB = dy' h
    # dA = dh' x, and where nothing below wants a gradient, dh = dy B as well
    assert both - only_b == tokens * rank * (sum(t.inputs for t in targets) + sum(t.outputs for t in first))


@PATHS
def test_jobs_that_train_other_factors_are_answered_together_as_alone(path):
    with norms_in_double():
        trained = engine(model(), lora=NARROW, path=path)
        jobs = {t: fit(adapter(NARROW, i), i, train=t) for i, t in enumerate(("AB", "A", "B"))}
        together = trained.answer(jobs)
        for train, job in jobs.items():
            alone = trained.answer({train: job})[train]
            assert distance(together[train].adapter, alone.adapter) < 1e-10


# Frozen factors


@PATHS
@WAYS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_over_frozen_factors_equals_training_over_a_base_that_holds_them(path, way, dropout):
    spec = replace(NARROW, dropout=dropout)
    with norms_in_double():
        base, under = model(), frozen()
        job = fit(adapter(NARROW), frozen=under)
        ours = engine(base, lora=spec, path=path).answer({0: job})[0]
        theirs = engine(merged(base, under), lora=spec, path=path).answer({0: replace(job, frozen=None)})[0]
    assert distance(ours.adapter, theirs.adapter) < 1e-10
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)


@PATHS
@WAYS
def test_each_row_has_its_own_frozen_factors_of_any_rank(path, way):
    with norms_in_double():
        base = model()
        unders = [None, frozen(2, 7), frozen(24, 8, scale=0.1), frozen(2, 7)]
        jobs = {i: fit(adapter(NARROW, i), i, frozen=under) for i, under in enumerate(unders)}
        answers = engine(base, lora=NARROW, path=path).answer(jobs)
        for i, under in enumerate(unders):
            whole = base if under is None else merged(base, under)
            expected = train_by_hand(plain_peft(whole, NARROW), jobs[i])
            assert distance(answers[i].adapter, expected) < 1e-10


def test_equal_frozen_factors_lie_in_memory_once():
    layout = AdapterLayout.of(model(), NARROW)
    tunings = [Tuning(None, frozen=under) for under in (frozen(), None, frozen(), frozen(seed=1))]
    bank = AdapterBank(layout, tunings, dtype=torch.float64, device=torch.device("cpu"), training=False)
    assert len(bank.under.group.rows) == 2
    assert bank.under.index.tolist() == [0, -1, 0, 1, -1]


@PATHS
@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "base"])
def test_scores_over_frozen_factors_are_those_of_a_base_that_holds_them(path, tuned):
    with norms_in_double():
        base, under = model(), frozen()
        asked = Score(examples(5), adapter(NARROW) if tuned else None, energy=True, per_token=True)
        ours = engine(base, lora=NARROW, path=path).answer(
            {0: replace(asked, frozen=under, scale=3.0), 1: replace(asked, scale=3.0)}
        )
        theirs = engine(merged(base, under), lora=NARROW, path=path).answer({0: replace(asked, scale=3.0)})
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-10)
        assert one.energy == pytest.approx(other.energy, rel=1e-10)
        assert one.tokens.std == pytest.approx(other.tokens.std, rel=1e-8)
    assert [s.nll for s in ours[0]] != pytest.approx([s.nll for s in ours[1]], rel=1e-4)


@PATHS
@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "base"])
def test_answers_over_frozen_factors_are_those_of_a_base_that_holds_them(path, tuned):
    base, under = llama(torch.float64, initializer_range=0.2), frozen(scale=20.0)
    prompts = [example(n, n).ids for n in (3, 9, 20)]
    asked = Generate(prompts, adapter(NARROW) if tuned else None, 8, scale=4.0)
    ours = engine(base, lora=WIDE, path=path).answer({0: replace(asked, frozen=under), 1: asked})
    theirs = engine(merged(base, under), lora=WIDE, path=path).answer({0: asked})
    assert ours[0] == theirs[0] != ours[1]


def test_a_frozen_factor_of_a_module_without_lora_is_refused_by_name():
    spec = replace(NARROW, targets=("q_proj", "v_proj"))
    start = moved(AdapterLayout.of(model(), spec), torch.float64)
    with pytest.raises(ShapeMismatch, match=r"down_proj|gate_proj|k_proj|o_proj|up_proj"):
        engine(model(), lora=spec).answer({0: fit(start, frozen=frozen())})


def test_checkpointing_changes_nothing_over_frozen_factors():
    job = fit(adapter(NARROW), frozen=frozen())
    plain, thrifty = (
        engine(model(), lora=NARROW, path="fast", checkpointing=on).answer({0: job})[0].adapter
        for on in (False, True)
    )
    assert plain.sha256() == thrifty.sha256()
