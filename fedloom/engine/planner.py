"""How to run: kernels, sizes, how many rows at once. A choice depends on the machine, never on a clock.

A timed calibration would now and then choose differently on the same machine, and a resumed run would not repeat
to the bit. So kernels are chosen by processor type and by a measured error.
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
    """Inside, float32 products go to MKL whatever the plan says; for small matrices of ever-changing size it is just as fast.

    oneDNN compiles a kernel for every size it meets and keeps it: hundreds of MB with new examples every round.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reuse_memory() -> None:
    """Make glibc reuse freed memory at once, instead of asking the system for new pages that must be cleared.

    Passes constantly allocate and free tensors of a few MB. By default the larger ones are mapped and unmapped
    each time, which took 3 to 7 per cent of a round. `return_memory` gives free memory back in between.
    """
    if mallopt := _c_library("mallopt"):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def return_memory() -> None:
    """Give freed memory back to the system where the C library would keep it (glibc).

    Examples of varying length fragment the heap: after twenty rounds of 512-token examples the process held 5.4 GB,
    five times what the model needs between rounds. The call takes no measurable time.
    """
    if trim := _c_library("malloc_trim"):
        trim(0)


def _c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _onednn_is_exact_and_wider() -> bool:
    """On AMD processors with AVX-512, MKL stays with AVX2 and oneDNN ("medium") is twice as fast in full float32.

    Elsewhere "medium" may mean bfloat16 products; the measured error shows this, and it is then not used.
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
