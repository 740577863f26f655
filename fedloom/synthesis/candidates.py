"""A synthesizer's result: every candidate with its fate, so that nothing is dropped silently."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.algorithms.synthetic import plain
from fedloom.data.example import Example

KEPT = "kept"


@dataclass(frozen=True)
class Candidate:
    """One generated text and what became of it.

    `fate` is "kept", "failed/CODE" (the model wrote nothing usable) or "filtered/CODE" (it did, and a
    filter dropped it). A dropped candidate may hold private text: it must not leave its client.
    """

    example: Example  # as far as it got: a failed one may lack a response
    fate: str = KEPT


@dataclass(frozen=True)
class Synthesis:
    """The candidates of one client in one round, in the order they were generated."""

    candidates: tuple[Candidate, ...] = ()
    repeated: int = 0  # draws that were skipped: greedy decoding had already answered the same prompt

    @property
    def examples(self) -> list[Example]:
        return [c.example for c in self.candidates if c.fate == KEPT]

    @property
    def counts(self) -> Mapping[str, int]:
        """Candidates by fate; "generated" is the sum of all fates, without "repeated"."""
        fates = Counter(c.fate for c in self.candidates)
        return {
            "generated": len(self.candidates),
            KEPT: fates.pop(KEPT, 0),
            **dict(sorted(fates.items())),
            "repeated": self.repeated,
        }

    def samples(self, per_fate: int = 2) -> dict[str, list[dict[str, Any]]]:
        """The first few candidates of each fate, as JSON values, for a report on the client's side."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for index, c in enumerate(self.candidates):
            if len(found[c.fate]) < per_fate:
                found[c.fate].append({"index": index, **plain(c.example)})
        return dict(sorted(found.items()))
