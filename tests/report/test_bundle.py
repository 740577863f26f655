"""The plot library that pages carry."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

from fedloom.report import bundle, page


def test_the_library_is_the_one_that_npm_publishes() -> None:
    text = gzip.decompress(bundle.compressed())
    assert hashlib.sha256(text).hexdigest() == bundle.SHA256
    assert f"plotly.js (cartesian - minified) v{bundle.VERSION}".encode() in text[:200]


def test_a_page_of_every_section_is_light(methods_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert page.write(methods_folder(rounds=20)).stat().st_size <= 1_500_000


def test_a_preview_of_a_partition_is_light_and_has_its_table(tmp_path: Path) -> None:
    clients = [{"client": f"c{i}", "size": 2, "counts": {"a": 1, "b": 1}, "distance": 0.0} for i in range(3)]
    made = page.write_partition(
        {"by": "category", "distance": 0.0, "totals": {"a": 3, "b": 3}, "clients": clients},
        tmp_path / "p.html",
    )
    assert made.stat().st_size <= 1_000_000
    text = made.read_text("utf-8")
    assert "Content-Security-Policy" in text
    assert '<th scope="row">c2</th>' in text
