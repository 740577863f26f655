"""Both orders, averages, intervals, and replies that are kept: with judges whose mind is a lambda."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.evaluation.cache import Cache, key_of
from fedloom.evaluation.judge import Shown, compare, missing
from fedloom.evaluation.pairwise import Rating, share, summarise
from fedloom.evaluation.verdicts import ASPECTS, TOTAL, Failed, Rubric, Scores, Verdict

Says = Callable[[str, str], tuple[float, float] | str | None]


@dataclass
class Fake:
    """Scores two answers by `says`: a pair of totals, None for a malformed reply, text for a failure."""

    says: Says
    rubric: Rubric = TOTAL
    varies: bool = True
    name: str = "fake"
    seen: list[Shown] = field(default_factory=list)
    stop_after: int | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name}

    def rate(self, shown: Mapping[str, Shown]) -> Generator[tuple[str, Verdict | Failed], None, None]:
        for key, one in shown.items():
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(one)
            said = self.says(one.first, one.second)
            if isinstance(said, str):
                yield key, Failed(said)
            else:
                yield key, Verdict(None if said is None else Scores((said[0],), (said[1],)), "reply")


def ask(*names: str) -> list[Example]:
    return [Example(f"Question {n}?", f"Reference {n}.", id=n) for n in names]


def by_number(first: str, second: str) -> tuple[float, float]:
    return float(first), float(second)


def judged(says: Says, ours: list[str], theirs: list[str], **options: Any):
    options = {"cache": Cache(), **options}
    return compare(Fake(says), ask(*map(str, range(len(ours)))), ours, theirs, **options)


def test_a_fair_judge_counts_wins_ties_and_losses():
    found = judged(by_number, ["9", "5", "2", "8"], ["3", "5", "7", "1"])
    assert [p.outcome for p in found.pairs] == ["win", "tie", "lose", "win"]
    assert (found.win.count, found.tie.count, found.lose.count, found.win_or_tie.count) == (2, 1, 1, 3)
    assert found.order_disagreement.count == 0


def test_a_judge_that_always_prefers_the_first_gives_ties_and_total_disagreement():
    found = judged(lambda first, second: (9, 1), ["a", "b"], ["c", "d"])
    assert (found.win.count, found.tie.count, found.lose.count) == (0, 2, 0)
    assert found.order_disagreement.share == 1.0
    assert found.position_bias == 8.0  # 9 - 1


def test_quality_does_not_pass_for_position_bias_where_one_order_was_not_read():
    # A judge without any liking for a position; it cannot read the better answer when that stands second.
    found = judged(
        lambda f, s: None if s == "9" else by_number(f, s), ["9", "9", "4"], ["1", "1", "5"], retries=0
    )
    assert (found.judged, found.ratings - sum(found.unread.values())) == (1, 4)
    assert found.position_bias == 0.0  # all four readings together would give (8 + 8 - 1 + 1) / 4 = 4


def test_position_bias_weighs_both_orders_alike_however_often_each_was_read():
    # Quality 4 of ours, one point for the first place; swapped, two of three repetitions are not read.
    ratings = [Rating(0, False, Verdict(Scores((8.0,), (3.0,))))] * 3
    ratings += [Rating(0, True, Verdict(Scores((3.0,), (6.0,))))] + [Rating(0, True, Verdict(None))] * 2
    found = summarise(TOTAL, ratings, questions=1)
    assert found.position_bias == 1.0  # (5 - 3) / 2; all readings together would give (3 * 5 - 3) / 4 = 3


def test_asked_in_one_order_a_question_counts_with_it_and_nothing_is_said_of_the_order():
    judge = Fake(lambda f, s: (9, 1))
    found = compare(judge, ask("a", "b"), ["x", "y"], ["z", "w"], cache=Cache(), repeats=2, both_orders=False)
    assert [(s.first, s.second) for s in judge.seen] == [
        ("x", "z"),
        ("x", "z"),
        ("y", "w"),
        ("y", "w"),
    ]  # ours first
    assert (found.both_orders, found.judged, found.ratings, found.win.count) == (False, 2, 4, 2)
    assert (found.totals, found.relative) == ((18.0, 2.0), 9.0)
    assert (found.order_disagreement, found.position_bias) == (None, None)
    assert [p.orders_agree for p in found.pairs] == [None, None]


def test_one_order_and_both_share_what_is_kept():
    kept, judge = Cache(), Fake(by_number)
    compare(judge, ask("a"), ["2"], ["1"], cache=kept, both_orders=False)
    assert missing(judge, ask("a"), ["2"], ["1"], cache=kept, both_orders=False) == []
    assert [(s.first, s.second) for s in missing(judge, ask("a"), ["2"], ["1"], cache=kept)] == [("1", "2")]


def test_one_order_leaves_out_ratings_of_the_other():
    ratings = [
        Rating(0, False, Verdict(Scores((8.0,), (3.0,)))),
        Rating(0, True, Verdict(Scores((9.0,), (1.0,)))),
    ]
    found = summarise(TOTAL, ratings, questions=1, both_orders=False)
    assert (found.totals, found.ratings, found.unread) == ((8.0, 3.0), 1, {})


def test_the_second_order_shows_the_same_answers_swapped():
    judge = Fake(by_number)
    compare(judge, ask("q"), ["1"], ["2"], cache=Cache())
    assert [(s.first, s.second) for s in judge.seen] == [("1", "2"), ("2", "1")]


def test_orders_are_averaged_before_the_verdict():
    found = judged(lambda f, s: {"ab": (7, 6), "ba": (9, 5)}[f + s], ["a"], ["b"])
    [pair] = found.pairs
    assert (pair.ours, pair.theirs, pair.outcome) == (6.0, 7.5, "lose")  # (7 + 5)/2, (6 + 9)/2
    assert not pair.orders_agree  # alone, the first order is a win


def test_repeated_ratings_are_averaged_within_their_order():
    turns = {("a", "b"): iter([(4, 1), (6, 1), (8, 1)]), ("b", "a"): iter([(1, 2), (1, 2), (1, 2)])}
    found = judged(lambda f, s: next(turns[f, s]), ["a"], ["b"], repeats=3)
    assert found.ratings == 6
    assert (found.pairs[0].ours, found.pairs[0].theirs) == (4.0, 1.0)  # ((4+6+8)/3 + 2)/2


def test_an_exact_tie_survives_thirds():
    # 1/3-means summed in floats differ in the last bit; here both sides get 7, 1, 2 in another order.
    turns = {("a", "b"): iter([(7, 1), (1, 2), (2, 7)]), ("b", "a"): iter([(2, 1), (7, 7), (1, 2)])}
    assert judged(lambda f, s: next(turns[f, s]), ["a"], ["b"], repeats=3).tie.count == 1


def test_aspects_are_averaged_into_one_score_and_shown_apart():
    @dataclass
    class Aspects(Fake):
        def rate(self, shown):
            for key, s in shown.items():
                a = (5.0, 4.0, 3.0, 2.0) if s.first == "a" else (1.0, 2.0, 2.0, 2.0)
                b = (5.0, 4.0, 3.0, 2.0) if s.second == "a" else (1.0, 2.0, 2.0, 2.0)
                yield key, Verdict(Scores(a, b))

    found = compare(Aspects(by_number, ASPECTS), ask("q"), ["a"], ["b"], cache=Cache())
    assert found.totals == (3.5, 1.75)  # (5+4+3+2)/4, (1+2+2+2)/4
    assert found.aspects["helpfulness"] == (5.0, 1.0)
    assert found.aspects["coherence"] == (2.0, 2.0)


def test_the_relative_score_is_the_ratio_of_the_sums():
    found = judged(by_number, ["8", "6", "10"], ["4", "8", "8"])
    assert found.totals == (24.0, 20.0)
    assert found.relative == pytest.approx(1.2)  # 24 / 20; the mean of the ratios would be 1.333
    low, high = found.relative_ci95
    assert 0.75 <= low < 1.2 < high <= 2.0  # the extreme resamples are one question three times: 6/8 and 8/4


def test_the_score_difference_has_students_interval():
    found = judged(
        by_number, ["3", "5", "7"], ["2", "3", "4"]
    )  # differences 1, 2, 3: sd 1, t(0.975, 2) = 4.3027
    assert found.difference.mean == 2.0
    assert found.difference.ci95 == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)


def test_one_ratio_for_every_question_has_an_interval_of_no_width():
    found = judged(by_number, ["1.1", "2.2", "6.6"], ["1", "2", "6"])
    assert found.relative_ci95 == (found.relative, found.relative)


def test_a_constant_score_difference_says_so():
    found = judged(by_number, ["1.1", "2.2", "6.6"], ["1.4", "2.5", "6.9"])  # -0.3 but for rounding
    assert found.difference.constant
    assert found.difference.ci95 == (found.difference.mean, found.difference.mean)


def test_shares_have_clopper_pearsons_interval():
    assert share(0, 10).ci95 == pytest.approx((0, 1 - 0.025 ** (1 / 10)))  # 0.3085
    assert share(10, 10).ci95 == pytest.approx((0.025 ** (1 / 10), 1))
    assert share(5, 10).ci95 == pytest.approx((0.18709, 0.81291), abs=1e-5)  # tables


def test_nothing_judged_is_no_share():
    found = judged(lambda f, s: "HTTP 500", ["a"], ["b"])
    assert found.judged == 0
    assert (found.win.share, found.difference, found.relative, found.position_bias) == (
        None,
        None,
        None,
        None,
    )
    assert found.unread == {"HTTP 500": 2}


def test_malformed_replies_are_asked_for_again_a_bounded_number_of_times_and_shown():
    judge = Fake(lambda f, s: None)
    found = compare(judge, ask("q"), ["a"], ["b"], cache=Cache(), retries=2)
    assert len(judge.seen) == 6  # 2 orders x (1 + 2 retries)
    assert (found.questions, found.judged, found.unread) == (1, 0, {"malformed reply": 2})


def test_a_retry_that_is_readable_counts():
    replies = iter([None, (9, 1), None, (2, 8)])  # the first order takes three attempts, the second one
    found = judged(lambda f, s: next(replies), ["a"], ["b"])
    assert (found.judged, found.unread) == (1, {})
    assert (found.pairs[0].ours, found.pairs[0].theirs) == (1.5, 8.5)  # (2 + 1)/2, (8 + 9)/2


def test_a_pair_with_one_readable_order_is_not_judged():
    found = judged(lambda f, s: (9, 1) if f == "a" else None, ["a", "5"], ["b", "a"])
    assert found.judged == 0  # neither question has both orders
    assert found.unread == {"malformed reply": 2}
    assert found.ratings == 4


def test_a_judge_that_always_says_the_same_is_not_asked_again():
    judge = Fake(lambda f, s: None, varies=False)
    compare(judge, ask("q"), ["a"], ["b"], cache=Cache(), retries=5)
    assert len(judge.seen) == 2


def test_repeating_a_judge_that_always_says_the_same_is_refused():
    with pytest.raises(ConfigError, match="repeats = 1"):
        compare(Fake(by_number, varies=False), ask("q"), ["1"], ["2"], cache=Cache(), repeats=3)


def test_unequal_numbers_of_answers_are_refused():
    with pytest.raises(ConfigError, match="2 questions, 1 of our answers"):
        compare(Fake(by_number), ask("q", "r"), ["1"], ["2", "3"], cache=Cache())


# --- what is kept ----------------------------------------------------------------------------------------


def test_a_repeated_evaluation_asks_nothing_and_finds_the_same(tmp_path):
    def run(judge):
        return compare(judge, ask("q", "r"), ["1", "2"], ["3", "1"], cache=Cache(tmp_path / "v.jsonl"))

    first, again = run(Fake(by_number)), Fake(by_number)
    assert run(again) == first
    assert again.seen == []


def test_malformed_replies_are_kept_too(tmp_path):
    def run(judge):
        return compare(judge, ask("q"), ["1"], ["2"], cache=Cache(tmp_path / "v.jsonl"))

    first, again = run(Fake(lambda f, s: None)), Fake(lambda f, s: (9, 1))
    assert run(again) == first
    assert again.seen == []


def test_failures_are_not_kept(tmp_path):
    path = tmp_path / "v.jsonl"
    compare(Fake(lambda f, s: "HTTP 503"), ask("q"), ["1"], ["2"], cache=Cache(path))
    assert compare(Fake(by_number), ask("q"), ["1"], ["2"], cache=Cache(path)).judged == 1


@pytest.mark.parametrize("stop", range(8))
def test_interrupted_anywhere_only_the_missing_calls_are_made(tmp_path, stop):
    arguments = (ask("p", "q", "r", "s"), ["1", "2", "3", "4"], ["4", "3", "2", "1"])
    whole = compare(Fake(by_number), *arguments, cache=Cache())
    with pytest.raises(KeyboardInterrupt):
        compare(Fake(by_number, stop_after=stop), *arguments, cache=Cache(tmp_path / "v.jsonl"))
    rest = Fake(by_number)
    assert compare(rest, *arguments, cache=Cache(tmp_path / "v.jsonl")) == whole
    assert len(rest.seen) == 8 - stop


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_damaged_last_line_costs_one_call(tmp_path, cut):
    path = tmp_path / "v.jsonl"
    arguments = (ask("q", "r"), ["1", "2"], ["3", "1"])
    whole = compare(Fake(by_number), *arguments, cache=Cache(path))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    for wanted in (1, 0):  # the line after the damaged one must be whole, too
        again = Fake(by_number)
        assert compare(again, *arguments, cache=Cache(path)) == whole
        assert len(again.seen) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another model"},
        {"question": "Another?"},
        {"ours": "3"},
        {"repeats": 2},
    ],
)
def test_a_verdict_hangs_on_everything_that_determines_it(change):
    cache = Cache()
    compare(Fake(by_number), ask("q"), ["1"], ["2"], cache=cache)
    other = Fake(by_number, name=change.get("name", "fake"))
    question = ask(change.get("question", "q"))
    compare(other, question, [change.get("ours", "1")], ["2"], cache=cache, repeats=change.get("repeats", 1))
    assert len(other.seen) == 2


def test_equal_pairs_share_one_call():
    judge = Fake(by_number)
    found = compare(judge, ask("q"), ["5"], ["5"], cache=Cache())
    assert (len(judge.seen), found.tie.count, found.ratings) == (1, 1, 2)


def test_missing_is_what_compare_would_ask(tmp_path):
    arguments = (ask("q", "r", "s"), ["1", "2", "3"], ["3", "1", "2"])
    cache = Cache()
    with pytest.raises(KeyboardInterrupt):
        compare(Fake(by_number, stop_after=4), *arguments, cache=cache)
    left = missing(Fake(by_number), *arguments, cache=cache)
    rest = Fake(by_number)
    compare(rest, *arguments, cache=cache)
    assert left == rest.seen
    assert missing(Fake(by_number), *arguments, cache=cache) == []


def test_progress_ends_with_everything_settled():
    told: list[tuple[int, int]] = []
    judged(by_number, ["1", "2"], ["2", "1"], on_progress=lambda done, all: told.append((done, all)))
    assert told[0] == (0, 4)
    assert told[-1] == (4, 4)


def test_keys_do_not_depend_on_the_order_of_names_but_on_every_value():
    assert key_of(a=1, b="x") == key_of(b="x", a=1) != key_of(a=1, b="y")


def test_a_cache_passes_over_lines_that_are_no_records(tmp_path: Path):
    path = tmp_path / "c.jsonl"
    Cache(path).put("k", {"v": 1})
    path.write_bytes(b'\n[1]\n{"v": 2}\n\xff\xfe\n' + path.read_bytes() + b'{"key": "k", "v": 3}\n')
    assert Cache(path).get("k") == {"v": 1}


def test_only_its_owner_may_read_a_cache(tmp_path: Path):
    Cache(tmp_path / "deep" / "c.jsonl").put("k", {})
    assert (tmp_path / "deep" / "c.jsonl").stat().st_mode & 0o077 == 0
