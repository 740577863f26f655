"""How to run: kernels, sizes, how many rows at once. A choice depends on the machine, never on a clock.

A timed calibration would now and then choose differently on the same machine, and a resumed run would
not repeat to the bit; so kernels are chosen by what the processor is and by a measured error.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fedloom.engine.layout import AdapterLayout

MULTIPLE = 128  # batches are padded to this: oneDNN compiles kernels for each shape and keeps them
BANK_BYTES = 2 << 30  # parameters, gradients and two moments of all rows at once
ERROR = 1e-5
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Plan:
    tokens_per_pass: int  # budget of one forward and backward
    rows: int  # training jobs advanced together; more wait for the next wave
    precision: Literal["highest", "medium"]  # float32 matrix products
    multiple: int = MULTIPLE

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Use the chosen kernels inside; the caller's setting is restored."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def smaller(self) -> Plan:
        """Half the budget, after running out of memory."""
        return replace(self, tokens_per_pass=self.tokens_per_pass // 2)


def plan(layout: AdapterLayout, *, tokens_per_pass: int, dtype: torch.dtype, device: torch.device) -> Plan:
    row_bytes = 4 * layout.size * max(4, dtype.itemsize)
    rows = max(1, min(64, BANK_BYTES // row_bytes))
    exact = dtype == torch.float32 and device.type == "cpu" and _onednn_is_exact_and_wider()
    return Plan(tokens_per_pass, rows, "medium" if exact else "highest")


@contextmanager
def ragged_sizes() -> Iterator[None]:
    """Products in float32 by MKL inside, whatever the plan: it is as fast where sizes are small and ever others.

    oneDNN compiles a kernel for every size it meets, and keeps it: with new examples every round, hundreds of MB.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reuse_memory() -> None:
    """Have freed memory used again at once instead of asked of the system anew and cleared page by page (glibc).

    Passes allocate and free tensors of some MB all the time. By default the larger ones are mapped and unmapped
    each time: that took 3 to 7 per cent of a round. `return_memory` gives back what is free in between.
    """
    if mallopt := _c_library("mallopt"):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def return_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it (glibc).

    Examples of ever other lengths leave its heap in pieces: twenty rounds of 512-token examples held 5.4 GB
    for a model that needs a fifth of that between rounds. It costs no time that could be measured.
    """
    if trim := _c_library("malloc_trim"):
        trim(0)


def _c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _onednn_is_exact_and_wider() -> bool:
    """On AMD processors with AVX-512, MKL stays with AVX2 and oneDNN ("medium") is twice as fast in full float32.

    Elsewhere "medium" may mean bfloat16 products; the error tells, and then it is not used.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "AuthenticAMD" not in cpuinfo.read_text():
        return False
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=stream)
    w = torch.randn(512, 256, generator=stream)
    exact = x.double() @ w.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = float((x @ w - exact).norm() / exact.norm())
    finally:
        torch.set_float32_matmul_precision(before)
    return math.isfinite(error) and error < ERROR
