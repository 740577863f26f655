from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

from fedloom.report import page, synthesis

Folder = Callable[..., Path]
COUNTS = {"generated": 10, "kept": 6, "filtered/verbatim": 3, "failed/empty": 1, "repeated": 2}


def section(folder: Path) -> str:
    found = re.search(r'<section id="synthesis".*?</section>', page.write(folder).read_text(), re.S)
    return found[0] if found else ""


def test_every_candidate_is_counted_once() -> None:
    told = synthesis.tally("federated", "FewFedPIT", {"counts": COUNTS, "samples": {}})
    assert [(f["fate"], f["count"], f["share"]) for f in told["fates"]] == [
        ("kept", 6, "60.0%"),
        ("failed/empty", 1, "10.0%"),
        ("filtered/verbatim", 3, "30.0%"),
    ]
    assert (told["kept"], told["generated"], told["repeated"]) == (6, 10, 2)


def test_nothing_generated_is_no_share_of_it() -> None:
    told = synthesis.tally("federated", "", {"counts": {"generated": 0, "kept": 0}, "samples": {}})
    assert told["share"] == "–"


def test_the_bars_of_a_method_add_up_to_all_candidates() -> None:
    summary = {
        "experiment": {"algorithm": {"name": "fewfedpit"}},
        "synthesis": {"federated": {"counts": COUNTS, "samples": {}}},
    }
    assert sum(trace.x[0] for trace in synthesis.fates_figure(summary).data) == 100.0


def test_every_fate_the_code_can_give_is_explained() -> None:
    code = (Path(synthesis.__file__).parents[1] / "synthesis").glob("*.py")
    text = "\n".join(path.read_text() for path in code)
    given = set(re.findall(r'"((?:failed|filtered)/[a-z-]+)"', text))
    codes = re.findall(r'(?:return|if [^"\n]+ else) "([a-z-]+)"|"([a-z-]+)" if ', text)
    filtered = {f"filtered/{a or b}" for a, b in codes if (a or b) not in ("kept",)}
    assert len(given) > 5
    assert given <= set(synthesis.MEANINGS)
    assert {f for f in filtered if f not in synthesis.MEANINGS} == set()


def test_a_fate_has_the_same_colour_wherever_it_stands_and_none_another_s() -> None:
    colours = [synthesis.colour(fate) for fate in synthesis.MEANINGS]
    assert len(set(colours)) == len(colours)


def test_an_unknown_fate_is_shown_all_the_same() -> None:
    told = synthesis.tally("x", "", {"counts": {"generated": 1, "filtered/new": 1}, "samples": {}})
    assert told["fates"][0]["meaning"] == "Dropped by a filter."


def test_texts_are_collapsed_escaped_and_said_to_be_there_in_a_simulation_only(
    methods_folder: Folder,
) -> None:
    shown = section(methods_folder())
    assert "<b>Say</b>" not in shown
    assert "<b>Say</b> it." in unescape(shown)
    assert "<details>" in shown
    assert "<details open" not in shown
    assert "on a network they stay with their client" in shown


def test_a_comparison_that_generated_nothing_has_no_such_section(compare_folder: Folder) -> None:
    assert section(compare_folder(seeds=1)) == ""
