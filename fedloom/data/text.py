"""How texts are compared, wherever that is done: words, and what two texts have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation and without stemming."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of ROUGE-L over lower-case words and numbers, without stemming (Lin 2004)."""
    return overlap(words(reference), words(answer))


def overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """`rouge_l` of texts that are words already."""
    if not one or not other:
        return float(not one and not other)
    common = LCSseq.similarity(one, other)
    return 2 * common / (len(one) + len(other))  # harmonic mean of common/len(one) and common/len(other)
