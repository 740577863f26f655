"""Rounding in blocks: the `block` values of a block share a scale and become small integers.

A value is off by at most half a step. A step is the largest magnitude of its block over `levels`, or
`SMALLEST` if that is more. Scales are truncated, never rounded up, so a step is never longer than that; they
keep enough digits for the largest value to lie within half a step of the last code. No block spans two
tensors; a tensor's last block may be short. NaN or infinity in a block makes its scale, and so all of it,
NaN; finite blocks stay finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Codes = NDArray[np.uint8]  # 8 or 4 bits per value, zero in the middle of their range
Scales = NDArray[np.uint16]  # a step per block: a float32's exponent and first 8 binary places, no sign

SMALLEST = 2.0**-126  # shortest step; a shorter one has too few digits to bound the error by half a step
LARGEST = torch.finfo(torch.float32).max
# Bits of a float32 that a scale drops. A step is short by less than 2^-8 of itself, 127 of them by less than
# half a step.
CUT = 15
CHUNK = 1 << 16  # values processed at a time: ten times as fast while they stay in the cache


def room(sizes: Sequence[int], *, bits: int, block: int) -> tuple[int, int]:
    """Number of code bytes and number of scales for tensors of these sizes."""
    return sum(-(-n * bits // 8) for n in sizes), sum(-(-n // block) for n in sizes)


def quantise(tensors: Sequence[Tensor], *, bits: int, block: int, levels: int) -> tuple[Codes, Scales]:
    """Codes and scales of flat float32 tensors."""
    sizes = [t.numel() for t in tensors]
    n_codes, n_scales = room(sizes, bits=bits, block=block)
    largest, codes = torch.empty(n_scales), np.empty(n_codes, np.uint8)
    half, work = 1 << (bits - 1), _buffer(sizes, block)
    whole = np.empty(work.shape, np.uint8)
    for i, start, n, _, row in _pieces(sizes, bits, block):
        x = _rows(tensors[i][start : start + n], block)
        torch.amax(torch.abs(x, out=work[: len(x)]), 1, out=largest[row : row + len(x)])
    largest.div_(levels)
    largest[(largest > 0) & (largest < SMALLEST)] = SMALLEST
    scales = (largest.numpy().view(np.uint32) >> CUT).astype(np.uint16)
    if bits == 4:  # for few levels 6 places are enough, and zstd compresses them better
        scales &= 0xFFFC
    steps = _steps(scales)
    sound = bool(steps.isfinite().all())
    steps = torch.where((steps > 0) & steps.isfinite(), steps, torch.inf)[:, None]
    for i, start, n, byte, row in _pieces(sizes, bits, block):
        x = _rows(tensors[i][start : start + n], block)
        w, q = work[: len(x)], whole[: len(x)]
        torch.div(x, steps[row : row + len(x)], out=w).round_()
        if not sound:
            w.nan_to_num_(nan=0.0)
        np.copyto(q, w.add_(half).numpy(), casting="unsafe")
        packed = q.reshape(-1) if bits == 8 else _packed(q)
        size = -(-n * bits // 8)
        codes[byte : byte + size] = packed[:size]
    return codes, scales


def restore(codes: Codes, scales: Scales, sizes: Sequence[int], *, bits: int, block: int) -> Tensor:
    """All tensors end to end, in float32."""
    flat = torch.empty(sum(sizes))
    half, steps = 1 << (bits - 1), _steps(scales)[:, None]
    steps = torch.where(steps.isfinite(), steps, torch.nan)
    huge = bool((steps > LARGEST / half).any())
    work = _buffer(sizes, block)
    done = 0
    for _, _, n, byte, row in _pieces(sizes, bits, block):
        part = codes[byte : byte - (-n * bits // 8)]
        values = part if bits == 8 else _unpacked(part)
        w = work[: -(-n // block)]
        np.copyto(w.view(-1).numpy()[:n], values[:n])
        w.sub_(half).mul_(steps[row : row + len(w)])
        if huge:
            w.clamp_(-LARGEST, LARGEST)  # NaN stays
        flat[done : done + n] = w.view(-1)[:n]
        done += n
    return flat


def _steps(scales: Scales) -> Tensor:
    return torch.from_numpy((scales.astype(np.uint32) << CUT).view(np.float32))


def _buffer(sizes: Sequence[int], block: int) -> Tensor:
    """Room for a chunk, or for the largest tensor if that is smaller."""
    return torch.zeros(min(max(1, CHUNK // block), -(-max(sizes, default=0) // block)), block)


def _rows(x: Tensor, block: int) -> Tensor:
    return (x if len(x) % block == 0 else torch.cat([x, torch.zeros(-len(x) % block)])).view(-1, block)


def _pieces(sizes: Sequence[int], bits: int, block: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(tensor, its first value, number of values, first code byte, first scale), one chunk at a time."""
    step, byte, row = max(1, CHUNK // block) * block, 0, 0
    for i, size in enumerate(sizes):
        for start in range(0, size, step):
            n = min(step, size - start)
            yield i, start, n, byte, row
            byte, row = byte - (-n * bits // 8), row - (-n // block)


def _packed(codes: Codes) -> Codes:
    """Two values per byte, the first in its lower half."""
    pairs = codes.reshape(-1).view("<u2")
    packed: Codes = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _unpacked(codes: Codes) -> Codes:
    pairs = codes.astype("<u2")
    codes = ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
    return codes
