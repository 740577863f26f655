from __future__ import annotations

import pytest
import torch

from fedloom.engine import layers, segments
from fedloom.engine.bank import AdapterBank, RowGroup, Tuning
from fedloom.engine.dropout import Dropout
from fedloom.engine.layers import ActivePass, inject
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Pass
from fedloom.engine.segments import Segments
from fedloom.steps import LoraSpec

INPUTS, OUTPUTS = 24, 40
SORTED = torch.tensor([0] * 5 + [1] * 2 + [3] * 7 + [-1] * 2)  # nothing belongs to row 2
MIXED = SORTED[torch.randperm(len(SORTED), generator=torch.Generator().manual_seed(3))]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("owner", [SORTED, MIXED], ids=["sorted", "mixed"])
@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_products_take_each_token_to_its_own_row(owner, kernel, monkeypatch):
    if kernel == "grouped":
        if segments._GROUPED is None:
            pytest.skip("this torch has no grouped_mm")
        monkeypatch.setattr(segments, "_one_kernel", lambda x, y: True)  # torch's own loop, on a CPU
    mine = Segments.of(owner, 4)
    assert (mine.order is None) == (owner is SORTED)
    x, into, matrices = randn(16, 8).float(), randn(16, 16).float(), randn(4, 8, 16).float()
    owned = owner >= 0
    single = torch.stack([x[t] @ matrices[max(o, 0)] for t, o in enumerate(owner.tolist())]) * owned[:, None]
    got = into.clone()
    mine.add_times_(got, mine.gather(x), matrices)
    assert torch.allclose(got, into + single, atol=1e-5)
    sums = mine.outer(mine.gather(x), mine.gather(into))
    for row in range(4):
        assert torch.allclose(sums[row], x[owner == row].t() @ into[owner == row], atol=1e-5)


def layer(rank, rows, dropout=0.0):
    """A linear layer with LoRA, its bank, and factors that matter."""
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS).double())
    model.get_output_embeddings = lambda: None
    layout = AdapterLayout.of(model, LoraSpec(rank=rank, alpha=4.0, dropout=dropout))
    bank = AdapterBank(
        layout,
        [Tuning(layout.to_state(randn(layout.size, seed=row))) for row in range(rows)],
        dtype=torch.float64,
        device=torch.device("cpu"),
        training=True,
    )
    active = ActivePass()
    inject(model, layout, active)
    return model, bank, active


def by_the_book(model, bank, owner, x, keep=None, gain=1.0):
    """y token by token, with autograd."""
    [target] = bank.layout
    params = bank.params.clone().requires_grad_()
    z = x if keep is None else x * keep * gain
    extra = [
        target.b(params[o]) @ (target.a(params[o]) @ z[t]) * bank.layout.spec.scale * (o >= 0)
        for t, o in enumerate(owner.tolist())
    ]
    return torch.nn.functional.linear(x, model[0].weight, model[0].bias) + torch.stack(extra), params


@pytest.mark.parametrize("owner", [SORTED, MIXED], ids=["sorted", "mixed"])
@pytest.mark.parametrize("how", ["masked", "segments though narrow", "too wide for a mask"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_every_way_to_multiply_gives_the_same_outputs_and_gradients(owner, how, rate, monkeypatch):
    monkeypatch.setattr(layers, "WORTH", 0 if how == "segments though narrow" else 1 << 60)
    model, bank, active = layer(48 if how == "too wide for a mask" else 3, 4, rate)
    [target] = bank.layout
    dropout = Dropout(rate, 0, torch.arange(16)) if rate else None
    lora = Pass.of(RowGroup(bank, range(4)), owner, dtype=torch.float64, dropout=dropout)
    assert (lora.select is None) == (how == "too wide for a mask")
    x, weight = randn(16, INPUTS).requires_grad_(), randn(16, OUTPUTS, seed=1)
    with active.using(lora):
        y = model(x[None])[0]
    (dx,) = torch.autograd.grad((y * weight).sum(), x)
    keep = dropout.keep(target.name, INPUTS) if dropout else None
    expected, params = by_the_book(model, bank, owner, x, keep, 1 / (1 - rate))
    dx_wanted, grads_wanted = torch.autograd.grad((expected * weight).sum(), (x, params))
    assert torch.allclose(y, expected, atol=1e-10)
    assert torch.allclose(dx, dx_wanted, atol=1e-10)
    assert torch.allclose(bank.grads, grads_wanted, atol=1e-9)


def test_a_pass_is_sorted_once_for_all_its_layers(monkeypatch):
    model, bank, active = layer(48, 4)
    lora = Pass.of(RowGroup(bank, range(4)), MIXED, dtype=torch.float64)
    times = []
    of = Segments.of
    monkeypatch.setattr(Segments, "of", lambda *args: times.append(1) or of(*args))
    for _ in range(3):
        with active.using(lora):
            model(randn(1, 16, INPUTS).requires_grad_()).sum().backward()
    assert len(times) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("owner", [SORTED, MIXED], ids=["sorted", "mixed"])
def test_the_grouped_kernel_agrees_with_the_loop(owner, rank):
    mine = Segments.of(owner.cuda(), 4)
    x = randn(len(owner), 64).to("cuda", torch.bfloat16)
    matrices = randn(64, 4, rank).to("cuda", torch.bfloat16).transpose(0, 1).mT.mT  # (4, 64, rank), strided
    own = mine.gather(x)
    by_hand = torch.zeros(len(own), rank, device="cuda", dtype=torch.bfloat16)
    for row, part in mine:
        by_hand[part] = own[part] @ matrices[row]
    assert torch.allclose(mine.times(own, matrices), by_hand, atol=0.1)
    sums = mine.outer(own, by_hand)
    for row, part in mine:
        assert torch.allclose(sums[row], own[part].t() @ by_hand[part], atol=2.0, rtol=0.02)
    assert not sums[2].any()
