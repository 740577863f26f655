"""Ask many rows about many items in units whose size depends on nothing else, so that a pool's workers share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from fedloom.steps import Engine, Steps, drive_groups

R = TypeVar("R", bound=Hashable)
T = TypeVar("T")


def ask(
    engine: Engine,
    items: Mapping[R, Sequence[T]],
    request: Callable[[R, Sequence[T]], Any],
    *,
    unit: int,
) -> Iterator[tuple[R, Sequence[T], Any]]:
    """Each row's items and the answer to `request(row, items)`, at most `unit` items of all rows in one batch.

    They come in order: a row's items may come in parts. Units are of nearly the same size, and the same ones
    whatever the number of workers.
    """
    asked = [(row, item) for row, its in items.items() for item in its]
    count = math.ceil(len(asked) / unit)
    units = (asked[len(asked) * n // count : len(asked) * (n + 1) // count] for n in range(count))
    work = (
        {row: _asked(row, [item for _, item in its], request) for row, its in groupby(pairs, itemgetter(0))}
        for pairs in units
    )
    for row, (part, answer) in drive_groups(work, engine):
        yield row, part, answer


def _asked(
    row: R, part: Sequence[T], request: Callable[[R, Sequence[T]], Any]
) -> Steps[tuple[Sequence[T], Any]]:
    answer = yield request(row, part)
    return part, answer
