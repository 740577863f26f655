"""FedIT's and FedPIT's tables from pairwise comparisons: sums, ratios, shares, and intervals over questions and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fedloom.evaluation.pairwise import Comparison, Rating, summarise
from fedloom.evaluation.tables import relative, wins
from fedloom.evaluation.verdicts import TOTAL, Failed, Scores, Verdict

Pairs = Sequence[tuple[float, float] | None]  # (baseline, federated) of each question; None: not judged


def compared(pairs: Pairs) -> Comparison:
    ratings = [
        Rating(
            q,
            swapped,
            Failed("no reply") if pair is None else Verdict(Scores((pair[swapped],), (pair[not swapped],))),
        )
        for q, pair in enumerate(pairs)
        for swapped in (False, True)
    ]
    return summarise(TOTAL, ratings, questions=len(pairs))


def table(*seeds: Pairs, categories: Sequence[str] = "", crossed: bool = False, divides: bool = True):  # type: ignore[no-untyped-def]
    of = [list(categories) or ["x"] * len(seed) for seed in seeds]
    return relative([compared(s) for s in seeds], of, divides=divides, crossed=crossed)


def test_scores_are_sums_over_questions_and_means_over_seeds() -> None:
    found = table([(2, 3), (4, 6)], [(1, 3), (5, 6)])
    assert found.scores == (6.0, 9.0)  # ((2 + 4) + (1 + 5)) / 2, ((3 + 6) + (3 + 6)) / 2
    assert found.ratio == 1.5


def test_a_ratio_that_is_the_same_everywhere_has_an_interval_of_itself() -> None:
    assert table([(2, 3), (4, 6)], [(6, 9), (2, 3)]).ci95 == (1.5, 1.5)


@pytest.mark.parametrize("crossed", [False, True])
def test_seeds_that_disagree_widen_the_interval(crossed: bool) -> None:
    alike = table([(4, 4)] * 20, [(4, 4)] * 20, [(4, 4)] * 20, crossed=crossed)
    apart = table([(4, 2)] * 20, [(4, 4)] * 20, [(4, 6)] * 20, crossed=crossed)
    assert (alike.ratio, apart.ratio, alike.ci95) == (1.0, 1.0, (1.0, 1.0))
    assert apart.ci95 == (0.5, 1.5)  # 1 in 27 resamples holds the first seed alone: more than 2.5%


def test_questions_that_every_seed_finds_hard_are_resampled_together() -> None:
    hard = [(1.0, 1.0)] * 10 + [(1.0, 9.0)] * 10
    crossed, nested = (table(*[hard] * 8, crossed=c).ci95 for c in (True, False))
    assert crossed is not None
    assert nested is not None
    assert crossed[1] - crossed[0] > 2 * (nested[1] - nested[0])  # eight seeds are no more questions


def test_a_question_that_was_not_judged_counts_for_neither_side() -> None:
    found = table([(2, 3), None, (4, 6)], categories=["a", "b", "a"])
    assert (found.scores, found.ratio, found.categories) == ((6.0, 9.0), 1.5, {"a": 1.5, "b": None})


def test_a_baseline_that_scores_nothing_has_no_ratio() -> None:
    found = relative([compared_rule([(0, 1), (0, 0)])], [["x", "y"]], divides=True, crossed=False)
    assert (found.ratio, found.ci95, found.categories) == (None, None, {"x": None, "y": None})


def test_where_there_is_no_ratio_there_is_a_difference_a_question() -> None:
    found = table([(2, 3), (4, 6), None], [(1, 3), (5, 6)], divides=False)
    assert found.difference.values == (1.5, 1.5)  # ((3 - 2) + (6 - 4)) / 2, ((3 - 1) + (6 - 5)) / 2
    assert found.difference.ci95 == (1.5, 1.5)
    one = table([(1, 2), (1, 4)], divides=False)
    assert one.difference.mean == 2.0  # over its questions: (1 + 3) / 2
    assert one.difference.ci95 is not None
    assert one.difference.ci95[0] < 0 < one.difference.ci95[1]


def test_where_the_baseline_may_score_nothing_the_interval_has_no_upper_end() -> None:
    found = relative([compared_rule([(0, 1)] * 9 + [(1, 1)])], [["x"] * 10], divides=True, crossed=False)
    assert found.ratio == 10.0
    assert found.ci95 is not None
    assert found.ci95[1] is None
    assert 1 < found.ci95[0] < 10


def compared_rule(pairs: Pairs) -> Comparison:
    return compared([None if p is None else (float(p[0]), float(p[1])) for p in pairs])


def test_a_scale_without_a_zero_has_no_ratio() -> None:
    found = table([(2, 3), (4, 6)], divides=False)
    assert (found.scores, found.ratio, found.ci95) == ((6.0, 9.0), None, None)


def test_ratios_within_categories() -> None:
    assert table([(2, 3), (4, 8)], [(2, 5), (4, 8)], categories=["a", "b"]).categories == {
        "a": 2.0,
        "b": 2.0,
    }  # (3 + 5) / (2 + 2), 16 / 8


WON, TIED, LOST = (2.0, 1.0), (1.0, 1.0), (1.0, 2.0)


def test_wins_are_shares_of_judged_questions_and_means_over_seeds() -> None:
    found = wins([[compared([WON, WON, TIED, LOST])], [compared([WON, LOST, LOST, None])]], [["x"] * 4] * 2)
    assert found is not None
    assert found.win.values == (0.5, 1 / 3)
    assert found.win.mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found.win_or_tie.values == (0.75, 1 / 3)
    assert found.win.mean + found.tie.mean + found.lose.mean == pytest.approx(1.0)
    assert found.win.ci95 is not None  # Student's t over two seeds


def test_one_seed_has_an_exact_interval_over_its_questions() -> None:
    found = wins([[compared([WON] * 10)]], [["x"] * 10])
    assert found is not None
    assert found.win.ci95 == pytest.approx((0.6915, 1.0), abs=1e-4)  # (0.025)^(1/10)


def test_the_models_of_several_clients_are_pooled_within_a_seed() -> None:
    found = wins([[compared([WON, WON]), compared([LOST, None])]], [["x", "y"]])
    assert found is not None
    assert found.win.mean == 2 / 3
    assert found.categories == {"x": 0.5, "y": 1.0}


def test_a_seed_without_a_judged_question_has_no_shares() -> None:
    assert wins([[compared([WON])], [compared([None])]], [["x"]] * 2) is None
