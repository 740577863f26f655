"""A client's own instructions, answered anew by the model it received: FewFedWeight's pseudo data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedloom.client import Words
from fedloom.data.example import Example
from fedloom.rng import Name
from fedloom.state import AdapterState
from fedloom.steps import Generate, Steps
from fedloom.synthesis.candidates import KEPT, Candidate, Synthesis


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """A synthesizer. Answers are greedy; an empty one is dropped ("failed/empty-output")."""

    response_tokens: int = 64

    def __call__(
        self,
        examples: Sequence[Example],
        adapter: AdapterState | None,
        words: Words,
        *,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[Synthesis]:
        if not examples:
            return Synthesis()
        answers: list[list[int]] = yield Generate(
            [words.prompt_ids(e, room=self.response_tokens) for e in examples],
            adapter,
            self.response_tokens,
            words.stop,
            stream=("pseudo", *stream),
        )
        said = [
            replace(e, response=words.decode(ids).strip()) for e, ids in zip(examples, answers, strict=True)
        ]
        return Synthesis(tuple(Candidate(e, KEPT if e.response else "failed/empty-output") for e in said))
