from __future__ import annotations

import pytest
import torch
from torch import nn

from fedloom.engine import attention
from fedloom.engine.attention import Blocks, attend
from fedloom.errors import ModelError

LENGTHS = (5, 1, 9)


def qkv(heads=4, kv_heads=2, total=18, width=6, *, grad=False):
    stream = torch.Generator().manual_seed(0)

    def make(h):
        x = torch.randn(1, h, total, width, generator=stream, dtype=torch.float64)
        return x.requires_grad_(grad)

    return make(heads), make(kv_heads), make(kv_heads)


def by_the_book(q, k, v, *, lengths=LENGTHS, window=None, cap=None, scaling=6**-0.5):
    """Softmax over visible keys, example by example and head by head."""
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype)
    start = 0
    for n in lengths:
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(start, start + n):
                first = start if window is None else max(start, i - window + 1)
                scores = k[0, g, first : i + 1] @ q[0, h, i] * scaling
                if cap is not None:
                    scores = torch.tanh(scores / cap) * cap
                out[0, i, h] = torch.softmax(scores, 0) @ v[0, g, first : i + 1]
        start += n
    return out


@pytest.mark.parametrize("kernel", ["dense", "fused"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_each_example_attends_to_itself_only(kernel, kv_heads, window, monkeypatch):
    monkeypatch.setattr(attention, "DENSE_LENGTH", 512 if kernel == "dense" else 0)
    q, k, v = qkv(kv_heads=kv_heads, grad=True)
    ours, _ = attend(nn.Module(), q, k, v, None, sliding_window=window, blocks=Blocks(LENGTHS))
    expected = by_the_book(q, k, v, window=window)
    assert torch.allclose(ours, expected, atol=1e-12)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, sum(LENGTHS) :] = 0.0
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert all(torch.allclose(g, w, atol=1e-12) for g, w in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_queries_in_parts_and_behind_a_shared_prefix(window, cap, kv_heads, monkeypatch):
    """Two examples behind one prefix of five tokens are two examples that begin with copies of it."""
    monkeypatch.setattr(attention, "PART_LENGTH", 1)  # so that nine queries make four parts
    prefixed = Blocks((5, 4, 9), ((0, 0), (0, 5), (0, 5)))
    q, k, v = qkv(kv_heads=kv_heads, grad=True)
    ours, _ = attend(nn.Module(), q, k, v, None, softcap=cap, sliding_window=window, blocks=prefixed)
    twice = [*range(9), *range(5), *range(9, 18)]
    expected = by_the_book(*(x[:, :, twice] for x in (q, k, v)), lengths=(9, 14), window=window, cap=cap)[
        :, [*range(9), *range(14, 23)]
    ]
    assert torch.allclose(ours, expected, atol=1e-12)
    grads = torch.autograd.grad(ours.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    assert all(torch.allclose(g, w, atol=1e-12) for g, w in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_softcap_and_scale_are_honoured(window):
    q, k, v = qkv(grad=True)
    options = {"softcap": 2.0, "scaling": 0.7, "sliding_window": window}
    ours, _ = attend(nn.Module(), q, k, v, None, blocks=Blocks(LENGTHS), **options)
    expected = by_the_book(q, k, v, cap=2.0, scaling=0.7, window=window)
    assert torch.allclose(ours, expected, atol=1e-12)
    grads = torch.autograd.grad(ours.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    assert all(torch.allclose(g, w, atol=1e-12) for g, w in zip(grads, wanted, strict=True))


def test_padding_yields_zeros_and_gets_no_gradient():
    q, k, v = qkv(grad=True)
    out, _ = attend(nn.Module(), q, k, v, None, blocks=Blocks(LENGTHS))
    assert not out[:, sum(LENGTHS) :].any()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(g[:, :, sum(LENGTHS) :].any() for g in grads)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(4)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"blocks": None}, "hand its arguments down"),
    ],
)
def test_what_it_does_not_know_it_refuses(options, name):
    with pytest.raises(ModelError, match=name):
        attend(nn.Module(), *qkv(), None, **{"blocks": Blocks(LENGTHS), **options})


def test_a_mask_of_the_model_is_refused():
    with pytest.raises(ModelError, match="mask"):
        attend(nn.Module(), *qkv(), torch.zeros(18, 18), blocks=Blocks(LENGTHS))
