"""A run's answers against an opponent's, in words."""

from __future__ import annotations

from typing import Any

from fedloom.report.judged import ONE_ORDER, pair

SHARE = {"count": 3, "of": 4, "share": 0.75, "ci95": [0.194, 0.994]}
JUDGED: dict[str, Any] = {
    "against": "base",
    "judge": {"judge": "microworld rule"},
    "win": SHARE,
    "tie": SHARE,
    "lose": SHARE,
    "win_or_tie": SHARE,
    "order_disagreement": None,
    "difference": {"mean": 0.5, "ci95": [0.1, 0.9], "constant": False},
    "totals": [3.0, 1.0],
    "relative": None,
    "relative_ci95": None,
    "aspects": {"overall": [1.0, 0.5]},
    "ratings": 5,
    "unread": {"malformed reply": 1},
    "judged": 4,
    "questions": 5,
    "both_orders": False,
    "position_bias": None,
}


def test_shares_stand_beside_their_intervals() -> None:
    assert pair(JUDGED).body[0] == ["win", "75.0%", "19.4 to 99.4%"]


def test_a_share_of_nothing_is_a_dash() -> None:
    nothing = {"count": 0, "of": 0, "share": None, "ci95": None}
    assert pair({**JUDGED, "win": nothing}).body[0] == ["win", "–", ""]


def test_ratings_that_could_not_be_read_are_counted_with_the_reason() -> None:
    notes = pair(JUDGED).notes
    assert notes[0] == "4 of 5 pairs judged; 4 of 5 ratings read."
    assert "1 without scores: malformed reply" in notes[1]


def test_one_order_is_said_and_two_are_not() -> None:
    assert ONE_ORDER in pair(JUDGED).notes
    assert ONE_ORDER not in pair({**JUDGED, "both_orders": True}).notes
