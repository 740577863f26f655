"""Rows and groups are told apart, whoever looks, on either page."""

from __future__ import annotations

import pytest

from fedloom.report import marks, synthesis

PAGES = ("#ffffff", "#1b1f24")  # cards, light and dark
LABELS = ["FedIT", "FedMIT", "LocIT+SA", "Mine"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", PAGES)
def test_every_mark_stands_out_on_both_pages(ground: str) -> None:
    used = {
        *marks.ROW_COLOURS.values(),
        *marks.GROUP_COLOURS,
        *marks.METHOD_COLOURS,
        *sum(synthesis.HUES.values(), ()),
    }
    assert {c: contrast(c, ground) for c in used if contrast(c, ground) < 3} == {}


def test_rows_differ_in_shape_and_dash() -> None:
    rows = ["base", "local mean", "local best", "federated", "centralised", *LABELS]
    assert len({marks.symbol(r, LABELS) for r in rows}) == len(rows)
    curves = ["local_only", "federated", "centralised", *LABELS]
    assert len({marks.dash(r, LABELS) for r in curves}) == len(curves)


def test_a_client_s_row_has_its_method_s_mark() -> None:
    assert marks.symbol("FedMIT personal:client-001", LABELS) == marks.symbol("FedMIT", LABELS)
    assert marks.symbol("local:client-001", LABELS) == marks.symbol("local_only")


def test_eight_neighbouring_bars_differ_in_pattern() -> None:
    assert len({marks.bar("#000000", k)["pattern"]["shape"] for k in range(8)}) == 8
