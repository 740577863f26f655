"""Judges: a language model that is asked in words, a rule, and the likelihood of a reference answer.

`PromptJudge` asks anything that writes text: an endpoint (`endpoint.py`) or a `LocalModel`. The other two ask
nobody and need no network. They score each answer on its own, so order cannot affect them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedloom.data import microworld
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.errors import ConfigError
from fedloom.evaluation.judge import Shown
from fedloom.evaluation.verdicts import (
    ASPECTS,
    LIKELIHOOD,
    READERS,
    RULE,
    TOTAL,
    Failed,
    Rubric,
    Scores,
    Verdict,
)
from fedloom.state import AdapterState
from fedloom.steps import Engine, Generate, Score, Scored

T = TypeVar("T")

BATCH = 16  # ratings that a local model makes before they are stored
RUBRICS: Mapping[str, Rubric] = {"aspects": ASPECTS, "total": TOTAL}
_SLOT = re.compile(r"\{(question|first|second|reference)\}")


# --- asking in words -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int = 0  # as the writer counted them; 0: unknown
    reply_tokens: int = 0


class Writer(Protocol):
    """Text in, text out."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def varies(self) -> bool: ...

    def write(self, prompts: Mapping[str, str]) -> Generator[tuple[str, Reply | Failed], None, None]:
        """A reply to each prompt under its key, as soon as it arrives."""
        ...


def shipped_prompt(rubric: Rubric) -> str:
    return (resources.files("fedloom.evaluation") / "prompts" / f"{rubric.name}.txt").read_text("utf-8")


def load_prompt(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as failed:
        raise ConfigError(
            f"Could not read the judge's prompt {path}: {failed}. Expected a UTF-8 text file."
        ) from failed


@dataclass(frozen=True)
class PromptJudge:
    """Asks `writer` in the words of `prompt`, where {question}, {first}, {second} and, optionally,
    {reference} are filled in. The reply must have the rubric's form, so a prompt of your own
    has to ask for that form."""

    writer: Writer
    rubric: Rubric
    prompt: str

    def __post_init__(self) -> None:
        if self.rubric.name not in READERS:
            raise ConfigError(
                f"Expected a rubric for replies in words ({', '.join(READERS)}), got {self.rubric.name!r}."
            )
        named = set(_SLOT.findall(self.prompt))
        if absent := [slot for slot in ("question", "first", "second") if slot not in named]:
            raise ConfigError(
                f"The judge's prompt lacks {{{absent[0]}}}. Expected {{question}}, {{first}} and {{second}} in it."
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.writer.identity, "prompt": self.prompt}

    @property
    def varies(self) -> bool:
        return self.writer.varies

    def words(self, shown: Shown) -> str:
        """The prompt as it is sent. Slots are filled in one pass, so an answer cannot open another."""
        q = shown.question
        said = {"question": q.question, "first": shown.first, "second": shown.second, "reference": q.response}
        return _SLOT.sub(lambda slot: said[slot[1]], self.prompt)

    def rate(self, shown: Mapping[str, Shown]) -> Generator[tuple[str, Verdict | Failed], None, None]:
        read = READERS[self.rubric.name]
        with closing(self.writer.write({key: self.words(s) for key, s in shown.items()})) as replies:
            for key, reply in replies:
                if isinstance(reply, Failed):
                    yield key, reply
                else:
                    yield key, Verdict(read(reply.text), reply.text, reply.prompt_tokens, reply.reply_tokens)


@dataclass(frozen=True)
class LocalModel:
    """A model on our own engine. `weights` names it (the sha256 of its weights) for the cache.

    A prompt that does not fit into the template's max_length together with the reply is a failure, never cut:
    its end says how to reply. Sampled replies depend on their key alone, not on the batch.
    """

    engine: Engine
    template: Template
    weights: str
    adapter: AdapterState | None = None
    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0  # of sampled replies

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "writer": "local",
            "weights": self.weights,
            "adapter": self.adapter.sha256() if self.adapter else None,
            "format": self.template.format,
            "system": self.template.system,
            "max_length": self.template.max_length,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    @property
    def varies(self) -> bool:
        return self.temperature > 0

    def write(self, prompts: Mapping[str, str]) -> Generator[tuple[str, Reply | Failed], None, None]:
        for part in _batches(prompts):
            ids = {key: self._ids(text) for key, text in part}
            requests: dict[Hashable, Generate] = {
                key: Generate(
                    [prompt],
                    self.adapter,
                    max_new_tokens=self.max_new_tokens,
                    stop=self.template.stop,
                    temperature=self.temperature,
                    stream=("judge", key),
                    seed=self.seed,
                )
                for key, prompt in ids.items()
                if prompt is not None
            }
            said = self.engine.answer(requests) if requests else {}
            for key, prompt in ids.items():
                if prompt is None:
                    yield key, Failed("prompt longer than the judge's max_length")
                else:
                    [reply] = said[key]
                    yield key, Reply(self.template.decode(reply), len(prompt), len(reply))

    def _ids(self, prompt: str) -> list[int] | None:
        ids = self.template.prompt_ids(prompt)
        whole = self.template.truncation(Example(prompt, "")) == "none"
        most = min(self.template.max_length, self.template.positions)
        return ids if whole and len(ids) + self.max_new_tokens <= most else None


# --- without words ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleJudge:
    """1 for an answer that satisfies the microworld rule of its question, else 0."""

    rubric: Rubric = RULE
    varies: bool = False

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"judge": "microworld rule"}

    def rate(self, shown: Mapping[str, Shown]) -> Generator[tuple[str, Verdict | Failed], None, None]:
        for key, s in shown.items():
            if not s.question.rule:
                yield key, Failed("question without a rule")
            else:
                first, second = (float(microworld.check(s.question, a)) for a in (s.first, s.second))
                yield key, Verdict(Scores((first,), (second,)))


SHOWN_AS = "Answer:"  # precedes the answer on which the likelihood is conditioned


@dataclass(frozen=True)
class LikelihoodJudge:
    """Which answer makes the reference likelier: a measure of nearness to it, offline and deterministic.

    An answer's score is the mean log-probability, in nats per token, of the *reference's* tokens after the
    model has read the question and that answer. Both answers are thus measured on the same tokens, so neither
    their length nor their fluency can matter. Measured on the answers' own tokens it would: a model prefers
    what it would have said itself. The score is the recall, one half of BARTScore's F (Yuan et al. 2021,
    arXiv 2106.11520).

    It tells whether an answer holds what the reference says, not whether it is true, and ignores anything
    else that the answer claims. It is only as good as the measuring model, so validate that on answers you
    know. One model has to measure both sides, ideally a third one. The scale has no zero, so there is no
    relative score.

    If question, answer and reference together exceed the template's max_length, the rating fails; nothing is
    cut. `template.reading_all()` allows the model's whole context.
    """

    engine: Engine
    template: Template
    weights: str  # sha256
    adapter: AdapterState | None = None
    rubric: Rubric = LIKELIHOOD
    varies: bool = False

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "judge": "likelihood",
            "weights": self.weights,
            "adapter": self.adapter.sha256() if self.adapter else None,
            "format": self.template.format,
            "system": self.template.system,
            "max_length": self.template.max_length,
            "shown_as": SHOWN_AS,
        }

    def rate(self, shown: Mapping[str, Shown]) -> Generator[tuple[str, Verdict | Failed], None, None]:
        for part in _batches(shown):
            # Each once.
            answers = list(dict.fromkeys((s.question, a) for _, s in part for a in (s.first, s.second)))
            found = dict(zip(answers, self._nearness(answers), strict=True))
            for key, s in part:
                first, second = found[s.question, s.first], found[s.question, s.second]
                if isinstance(first, Failed):
                    yield key, first
                elif isinstance(second, Failed):
                    yield key, second
                else:
                    yield key, Verdict(Scores((first,), (second,)))

    def _nearness(self, answers: Sequence[tuple[Example, str]]) -> list[float | Failed]:
        examples = [_after(question, answer) for question, answer in answers]
        problems = [self._problem(example) for example in examples]
        usable = [e for e, problem in zip(examples, problems, strict=True) if problem is None]
        # Only the reference is labelled, whatever training learns.
        tokens = [self.template.contrast(e)[0] for e in usable]
        scored = iter(self.engine.answer({"judge": Score(tokens, self.adapter)})["judge"] if usable else ())
        return [problem or _mean(next(scored)) for problem in problems]

    def _problem(self, example: Example) -> Failed | None:
        if not example.response.strip():
            return Failed("question without a reference")
        if self.template.truncation(example) != "none":
            return Failed("question, answer and reference longer than max_length")
        return None


def _after(question: Example, answer: str) -> Example:
    """The reference as the response, after `answer` as part of the context."""
    context = "\n\n".join(part for part in (question.context, f"{SHOWN_AS} {answer}") if part)
    return Example(question.instruction, question.response, context, turns=question.turns)


def _mean(scored: Scored) -> float | Failed:
    mean = -scored.nll / max(1, scored.targets)
    return mean if math.isfinite(mean) else Failed("likelihood that is not a finite number")


def _batches(items: Mapping[str, T]) -> Iterator[list[tuple[str, T]]]:
    rest = iter(items.items())
    while part := list(islice(rest, BATCH)):
        yield part
