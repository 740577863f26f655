"""The kernel runs on CUDA only. On a CPU a plain stand-in is registered under its name, so what is tested here is how
it is called; that the kernel does what its documentation says is tested where there is one (`gpu`)."""

from __future__ import annotations

import pytest
import torch

from fedloom.engine import varlen

pytest.importorskip("torch.nn.attention.varlen")
LENGTHS = (6, 4, 1, 5)  # the second, third and last attend to parts of the first
PREFIXES = ((0, 0), (0, 6), (2, 3), (0, 4))
TOTAL = 18  # two tokens of padding


def sequences(q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window):
    """What the documentation of torch.nn.attention.varlen promises: places, weights, keys and values of each."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    left, right = window
    assert causal == ((left, right) == (-1, 0))
    for n in range(len(q_ends) - 1):
        mine, keys = slice(*q_ends[n : n + 2]), slice(*k_ends[n : n + 2])
        length, reach = mine.stop - mine.start, keys.stop - keys.start
        assert 0 < length <= max_q
        assert length <= reach <= max_k
        row = torch.arange(length)[:, None] + reach - length  # aligned to the bottom right
        column = torch.arange(reach)
        seen = column <= row + right
        if left >= 0:
            seen &= column >= row - left
        times = q.shape[1] // k.shape[1]
        ks, vs = (x[keys].repeat_interleave(times, 1).transpose(0, 1) for x in (k, v))  # (H, reach, D)
        scores = q[mine].transpose(0, 1) @ ks.transpose(1, 2) * scale
        yield mine, keys, scores.masked_fill(~seen, float("-inf")).softmax(-1), ks, vs


def stand_in(
    q, k, v, q_ends, k_ends, max_q, max_k, causal=False, scale=None, window=None, gqa=False, *others
):
    out = torch.zeros_like(q)
    for mine, _, weights, _, vs in sequences(q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window):
        out[mine] = (weights @ vs).transpose(0, 1)
    return out, q.new_zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def stand_in_backward(
    grad, q, k, v, out, lse, q_ends, k_ends, max_q, max_k, causal, state, scale=None, window=None
):
    assert torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    shape = (k.shape[1], q.shape[1] // k.shape[1])
    for mine, keys, weights, ks, vs in sequences(
        q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window
    ):
        dout = grad[mine].transpose(0, 1)
        slope = dout @ vs.transpose(1, 2)
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
        dq[mine] = (slope @ ks).transpose(0, 1)
        dk[keys] = (
            (slope.transpose(1, 2) @ q[mine].transpose(0, 1)).unflatten(0, shape).sum(1).transpose(0, 1)
        )
        dv[keys] = (weights.transpose(1, 2) @ dout).unflatten(0, shape).sum(1).transpose(0, 1)
    return dq, dk, dv


@pytest.fixture(scope="module")
def kernel():
    import torch.nn.attention.varlen as flash

    flash._varlen_attn.register_kernel("cpu")(stand_in)
    flash._varlen_attn_backward.register_kernel("cpu")(stand_in_backward)


def qkv(kv_heads, *, dtype=torch.float64, width=8, device="cpu"):
    stream = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, TOTAL, width, generator=stream, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for h in (4, kv_heads, kv_heads)
    ]


def by_the_book(q, k, v, prefixes, *, scale, window):
    """Softmax over visible keys under one mask for the whole row: who sees whom, spelt out."""
    seen = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    start = 0
    for n, (first, count) in zip(LENGTHS, prefixes, strict=True):
        keys = [*range(first, first + count), *range(start, start + n)]
        for i in range(n):
            for place, key in enumerate(keys):
                at = count + i
                seen[start + i, key] = place <= at and (window is None or place > at - window)
        start += n
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen.to(q.device), float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)).to(v.dtype)[:, :, :start] @ v, start


def compare(q, k, v, prefixes, window, tolerance):
    expected, start = by_the_book(q, k, v, prefixes or [(0, 0)] * 4, scale=0.3, window=window)
    out = varlen.varlen(q, k, v, LENGTHS, scale=0.3, window=window, prefixes=prefixes)
    assert out.shape == (1, TOTAL, 4, q.shape[-1])
    assert not out[:, start:].any()
    assert torch.allclose(out[:, :start], expected.transpose(1, 2), atol=tolerance)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected.transpose(1, 2) * weight[:, :start]).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("prefixes", [None, PREFIXES])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_attention_within_examples_and_their_prefixes(kernel, prefixes, window, kv_heads):
    compare(*qkv(kv_heads), prefixes, window, 1e-12)


def test_the_switch_for_fixed_order_is_put_back(kernel):
    q, k, v = qkv(2)
    torch.set_deterministic_debug_mode("default")
    varlen.varlen(q, k, v, LENGTHS, scale=0.3).sum().backward()
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_it_is_not_for_cpus():
    assert not varlen.fits(*qkv(2, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_agrees(prefixes, window, kv_heads):
    q, k, v = qkv(kv_heads, dtype=torch.bfloat16, width=16, device="cuda")
    assert varlen.fits(q, k, v)
    compare(q, k, v, prefixes, window, 0.1)


@pytest.mark.gpu
def test_float32_does_not_fit_the_kernel():
    assert not varlen.fits(*qkv(2, dtype=torch.float32, width=16, device="cuda"))


@pytest.mark.gpu
def test_the_kernels_gradients_repeat_to_the_bit():
    stream = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 2048, 64, generator=stream).to("cuda", torch.bfloat16).requires_grad_()
        for _ in range(3)
    )

    def once():
        out = varlen.varlen(q, k, v, (1024, 512, 512), scale=0.1, prefixes=((0, 0), (0, 1024), (0, 1024)))
        return torch.autograd.grad(out.float().square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(once(), once(), strict=True))
