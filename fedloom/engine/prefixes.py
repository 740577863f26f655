"""Find examples that begin alike, so that the shared part is run once.

Instructions come in a template, and few-shot prompts repeat their demonstrations. A causal model gives equal
tokens at equal positions the same states, so running them once changes results only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile

LONG_ENOUGH = 16  # tokens; each shared prefix costs every layer a little


def shared_prefixes(examples: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
    """Examples that share a prefix, by index, and the prefix's length: 0 for one that shares none.

    Among all groupings of examples with equal beginnings, this is the one that saves most tokens. A prefix leaves
    each of its examples at least one token of its own. Groups and members are in the order of `examples`.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i])
    common = [_common(examples[i], examples[j]) for i, j in pairwise(order)]
    groups = [(p, sorted(order[start:end])) for p, start, end in _best(common, 0, len(order))]
    return sorted(groups, key=lambda group: group[1][0])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return min(sum(1 for _ in alike), len(one) - 1, len(other) - 1)


def _best(common: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Cut sorted examples start..end into groups (prefix, from, to); `common[i]` is what i and i + 1 share."""
    if end - start <= 1:
        yield from [(0, start, end)][: end - start]
        return
    p = min(common[start : end - 1])
    cuts = [i + 1 for i in range(start, end - 1) if common[i] == p]
    edges = [start, *cuts, end]
    apart = [group for a, b in pairwise(edges) for group in _best(common, a, b)]
    saved = sum(q * (b - a - 1) for q, a, b in apart)
    if p >= LONG_ENOUGH and p * (end - start - 1) >= saved:
        yield p, start, end
    else:
        yield from apart
