"""A CPU has torch._scaled_mm too. Tests that take it (`in_8_bits`) run every line a GPU does but the fused quantiser."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LOCAL, engine, examples, llama, moved
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.engine import fp8
from fedloom.engine.bank import AdapterBank, Tuning
from fedloom.engine.fp8 import Fp8Linear
from fedloom.engine.models import load_base
from fedloom.engine.packing import Encoded, Item
from fedloom.errors import ModelError
from fedloom.steps import Fit, LoraSpec

LORA = LoraSpec(rank=4, alpha=8.0)


@pytest.fixture
def in_8_bits(monkeypatch):
    monkeypatch.setattr(fp8, "has_product", lambda x: fp8._in_8_bits)


def linear(inputs=96, outputs=64, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def off(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def both_ways(module, x, weight):
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad((y * weight).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_weights_are_the_rounded_ones(dtype, monkeypatch):
    monkeypatch.setattr(fp8, "_CHUNK", 96 * 20)  # channels in four parts, the last one shorter
    plain = linear(dtype=dtype)
    ours = Fp8Linear(plain)
    x, weight = torch.randn(2, 7, 96).to(dtype), torch.randn(2, 7, 64).to(dtype)
    y, dx = both_ways(ours, x, weight)
    rounded = linear(dtype=dtype)
    rounded.weight.copy_(ours.codes.float() * ours.scale)
    wanted, dx_wanted = both_ways(rounded, x, weight)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert off(y, wanted) < tolerance
    assert off(dx, dx_wanted) < tolerance
    assert 0.01 < off(rounded.weight, plain.weight) < 0.04  # three bits: 2^-4 at most, 2^-5.2 in the mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_8_bits_are_near_the_exact_ones(dtype, in_8_bits):
    plain = linear(dtype=dtype)
    x, weight = torch.randn(2, 7, 96).to(dtype), torch.randn(2, 7, 64).to(dtype)
    x[0, 0] *= 1e4  # a scale of its own
    x[0, 1] = 0
    got, wanted = both_ways(Fp8Linear(plain), x, weight), both_ways(plain, x, weight)
    assert 0.01 < off(got[0][0, 2:], wanted[0][0, 2:]) < 0.06
    assert 0.01 < off(got[1], wanted[1]) < 0.06
    assert torch.allclose(got[0][0, 1], plain.bias)


def test_channels_far_apart_do_not_drown_each_other(in_8_bits):
    plain = linear(bias=False)
    plain.weight[:32] *= 1e4
    x, weight = torch.randn(7, 96), torch.randn(7, 64)
    weight[:, :32] *= 1e-4  # so that both halves matter to dx
    got, wanted = both_ways(Fp8Linear(plain), x, weight), both_ways(plain, x, weight)
    assert off(got[0][:, 32:], wanted[0][:, 32:]) < 0.06
    assert off(got[1], wanted[1]) < 0.06


def gradient(quantize):
    """Loss and gradient of a batch, on a trained model with an adapter far from zero."""
    model, _ = load_base("embedded", dtype="float32", quantize=quantize)
    fast = engine(model, lora=LORA, path="fast")
    items = [Item(0, Encoded.of(tokens), weight=0.01) for tokens in examples(12)]
    bank = AdapterBank(
        fast.layout,
        [Tuning(moved(fast.layout))],
        dtype=torch.float32,
        device=torch.device("cpu"),
        training=True,
    )
    losses = fast.served.packed.losses(items, bank)
    return float(losses.mean()), bank.grads[0]


@pytest.mark.parametrize("exact", [True, False], ids=["whole weights", "8 bits"])
def test_loss_and_gradient_of_a_trained_model_are_near_the_full_ones(exact, request):
    if not exact:
        request.getfixturevalue("in_8_bits")
    loss, grad = gradient("fp8")
    full_loss, full_grad = gradient(None)
    assert abs(loss - full_loss) < 0.01 * full_loss
    cosine = float(torch.nn.functional.cosine_similarity(grad, full_grad, dim=0))
    assert 0.99 < cosine < 0.99999


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_agrees_with_peft_over_the_same_base(targets, dtype, in_8_bits):
    model, _ = load_base("embedded", dtype=dtype, quantize="fp8")
    fast = engine(model, lora=LoraSpec(rank=4, alpha=8.0, targets=targets))
    assert fast.path_reason == ""
    assert {target.kind for target in fast.layout} == {"opaque"}
    assert fast.model.dtype == getattr(torch, dtype)


def test_rows_together_equal_rows_alone_and_runs_repeat(in_8_bits):
    model = llama()
    fp8.quantise(model)
    fast = engine(model, lora=LORA, path="fast")
    jobs = {
        k: Fit(moved(fast.layout, seed=k), examples(3 + k, k), LOCAL, stream=(f"c{k}",)) for k in range(3)
    }
    once, again = fast.answer(jobs), fast.answer(jobs)
    alone = {k: fast.answer({k: job})[k] for k, job in jobs.items()}
    for k in jobs:
        name = next(iter(jobs[k].adapter))
        assert torch.equal(once[k].adapter[name], again[k].adapter[name])
        assert not torch.equal(once[k].adapter[name], jobs[k].adapter[name])
        assert once[k].loss == pytest.approx(alone[k].loss, rel=0.02)


def test_the_head_and_odd_sizes_stay_as_they_are():
    model = llama(intermediate_size=40)
    fp8.quantise(model)
    kinds = {
        name.rsplit(".", 1)[-1]: type(m)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert kinds["q_proj"] is kinds["o_proj"] is Fp8Linear
    assert kinds["lm_head"] is kinds["up_proj"] is kinds["down_proj"] is torch.nn.Linear


def test_a_device_that_multiplies_wrongly_is_refused(in_8_bits, monkeypatch):
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **how: 1.2 * right(*args, **how))
    with pytest.raises(ModelError, match=r"relative error of 2\.\de-01"):
        fp8.quantise(llama(torch.bfloat16))


def test_a_device_that_does_not_multiply_is_refused(in_8_bits, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    with pytest.raises(ModelError, match="no kernel image; leave quantize out"):
        fp8.quantise(llama(torch.bfloat16))


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    with pytest.raises(ModelError, match="GPT2LMHeadModel is made of Conv1D"):
        fp8.quantise(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)))
    assert fp8.refused(torch.device("cpu"), torch.float32) is None
    assert "no 8-bit" in fp8.refused(torch.device("mps"), torch.bfloat16)
    assert "float32" in fp8.refused(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "this device has 8.0" in fp8.refused(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.refused(torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs 8-bit tensor cores",
)
def test_a_gpu_multiplies_as_the_cpu_does():
    plain = linear(256, 128, torch.bfloat16)
    x, weight = torch.randn(64, 256).to(torch.bfloat16), torch.randn(64, 128).to(torch.bfloat16)
    wanted = both_ways(plain, x, weight)
    ours = Fp8Linear(plain).cuda()
    assert fp8.has_product(x.cuda())
    got = both_ways(ours, x.cuda(), weight.cuda())
    assert 0.01 < off(got[0].cpu(), wanted[0]) < 0.06
    assert 0.01 < off(got[1].cpu(), wanted[1]) < 0.06
    fused, slow = fp8._fused()(x.cuda(), None), fp8._quantised(x.cuda(), None)
    assert off(fused[0].float() * fused[1], slow[0].float() * slow[1]) < 0.02
