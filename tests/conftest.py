"""What every test stands on: one thread, no network, and the shared data where a checkout has it."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and the Hub's client are imported: both read these once.
os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and trained tiny models, which lie beside a checkout and not in it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder.name} folder beside the checkout")
    return folder
