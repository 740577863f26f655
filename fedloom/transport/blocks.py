"""Rounding in blocks: so many values share a scale and become small whole numbers.

A value is off by half a step at most, a step being the largest of its block over `levels`. No block spans two
tensors; the last of a tensor may be short. NaN and infinity make the scale, and so the block, no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Codes = NDArray[np.uint8]  # 8 or 4 bits a value, zero in the middle of their range
Scales = NDArray[np.uint16]  # a step for each block: the bits of a bfloat16, for which numpy has no name

SMALLEST = 2.0**-126  # a smaller step has too few digits for half a step to be kept; such a block is zeros
CHUNK = 1 << 16  # values worked on at a time: what stays in the cache is ten times as fast


def room(sizes: Sequence[int], *, bits: int, block: int) -> tuple[int, int]:
    """Bytes of codes and number of scales for tensors of these sizes."""
    return sum(-(-n * bits // 8) for n in sizes), sum(-(-n // block) for n in sizes)


def quantise(tensors: Sequence[Tensor], *, bits: int, block: int, levels: int) -> tuple[Codes, Scales]:
    """Of flat float32 tensors."""
    sizes = [t.numel() for t in tensors]
    n_codes, n_scales = room(sizes, bits=bits, block=block)
    largest, codes = torch.empty(n_scales), np.empty(n_codes, np.uint8)
    half, work = 1 << (bits - 1), _buffer(sizes, block)
    whole = np.empty(work.shape, np.uint8)
    for i, start, n, _, row in _pieces(sizes, bits, block):
        x = _rows(tensors[i][start : start + n], block)
        torch.amax(torch.abs(x, out=work[: len(x)]), 1, out=largest[row : row + len(x)])
    scales = largest.div_(levels).to(torch.bfloat16)
    scales[scales < SMALLEST] = 0
    sound = bool(scales.isfinite().all())
    inverse = torch.where((scales > 0) & scales.isfinite(), scales.float().reciprocal(), 0.0)[:, None]
    for i, start, n, byte, row in _pieces(sizes, bits, block):
        x = _rows(tensors[i][start : start + n], block)
        w, q = work[: len(x)], whole[: len(x)]
        torch.mul(x, inverse[row : row + len(x)], out=w).add_(half + 0.5)
        if not sound:
            w.nan_to_num_(nan=half)
        np.copyto(q, w.numpy(), casting="unsafe")  # cuts off, which after adding a half is rounding
        packed = q.reshape(-1) if bits == 8 else _packed(q)
        size = -(-n * bits // 8)
        codes[byte : byte + size] = packed[:size]
    return codes, scales.view(torch.uint16).numpy()


def restore(codes: Codes, scales: Scales, sizes: Sequence[int], *, bits: int, block: int) -> Tensor:
    """All tensors end to end, float32."""
    flat = torch.empty(sum(sizes))
    steps = torch.from_numpy(scales).view(torch.bfloat16).float()[:, None]
    work = _buffer(sizes, block)
    done = 0
    for _, _, n, byte, row in _pieces(sizes, bits, block):
        part = codes[byte : byte - (-n * bits // 8)]
        values = part if bits == 8 else _unpacked(part)
        w = work[: -(-n // block)]
        np.copyto(w.view(-1).numpy()[:n], values[:n])
        w.sub_(1 << (bits - 1)).mul_(steps[row : row + len(w)])
        flat[done : done + n] = w.view(-1)[:n]
        done += n
    return flat


def _buffer(sizes: Sequence[int], block: int) -> Tensor:
    """Room for a chunk, or for the largest tensor where that is less."""
    return torch.zeros(min(max(1, CHUNK // block), -(-max(sizes, default=0) // block)), block)


def _rows(x: Tensor, block: int) -> Tensor:
    return (x if len(x) % block == 0 else torch.cat([x, torch.zeros(-len(x) % block)])).view(-1, block)


def _pieces(sizes: Sequence[int], bits: int, block: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(tensor, its first value, values, first byte of codes, first scale), a chunk at a time."""
    step, byte, row = max(1, CHUNK // block) * block, 0, 0
    for i, size in enumerate(sizes):
        for start in range(0, size, step):
            n = min(step, size - start)
            yield i, start, n, byte, row
            byte, row = byte - (-n * bits // 8), row - (-n // block)


def _packed(codes: Codes) -> Codes:
    """Two values a byte, the first in its lower half."""
    pairs = codes.reshape(-1).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def _unpacked(codes: Codes) -> Codes:
    pairs = codes.astype("<u2")
    return ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
