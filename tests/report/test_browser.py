"""The page in a real browser, where there is one: under its own policy, from a file, without a network."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.report import page
from fedloom.report.pictures import Picture, pictures
from fedloom.storage.files import read_summary

BROWSER = next(
    (b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def drawn(file: Path) -> str:
    """The page as it stands after its scripts."""
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=30000",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    return subprocess.run(
        [BROWSER, *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


@needs_browser
@pytest.mark.slow
def test_every_figure_is_drawn_and_every_table_and_figure_can_be_taken_along(
    compare_folder: Callable[..., Path],
) -> None:
    folder = compare_folder(seeds=2, rounds=2)
    seen = drawn(page.write(folder))
    assert "This figure is drawn by a script" not in seen.split("<main>")[1].split("<script")[0]
    assert seen.count(">Save as SVG</button>") == seen.count('<div class="plot js-plotly-plot"') == 8
    assert (
        seen.count(">Copy as CSV</button>") == seen.count(">Copy as LaTeX</button>") == seen.count("<table")
    )


@needs_browser
@pytest.mark.slow
def test_a_page_whose_library_was_changed_does_not_run_it(
    compare_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.report.bundle.SHA256", "0" * 64)
    seen = drawn(page.write(compare_folder(seeds=1, rounds=2)))
    assert ">Save as SVG</button>" not in seen
    assert ">Copy as CSV</button>" in seen


def test_every_figure_s_numbers_are_in_a_table(methods_folder: Callable[..., Path]) -> None:
    summary = read_summary(methods_folder())
    assert summary is not None
    shown: dict[str, Picture] = pictures(summary, {})
    assert {"rows", "partition", "bytes"} <= shown.keys()
    assert all(p.body for p in shown.values())
