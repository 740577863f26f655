"""What algorithms are called, in settings and on pages."""

from __future__ import annotations

import pytest

from fedloom.algorithms.names import ALGORITHMS, ALIASES, cited, title


def test_every_algorithm_has_a_title_of_its_own() -> None:
    assert len({made.title for made in ALGORITHMS.values()}) == len(ALGORITHMS)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_has_the_title_and_the_source_of_its_algorithm(alias: str, name: str) -> None:
    assert title(alias) == title(name) == ALGORITHMS[name].title
    assert cited(alias) == cited(name)


def test_an_algorithm_of_another_version_keeps_the_name_it_has() -> None:
    assert title("fedfuture") == cited("fedfuture") == "fedfuture"
