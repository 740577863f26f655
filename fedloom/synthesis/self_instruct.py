"""New instructions and responses from a client's own examples, by a model that continues numbered lists.

FedPIT's self-generation (arXiv 2403.06131v3, section 3.3), after Self-Instruct (Wang et al. 2022,
https://arxiv.org/abs/2212.10560), in two phases:

1. Instructions. Eight of the client's instructions, drawn at random, form a numbered list; the model
   writes the ninth.
2. Responses. A few of the client's examples form numbered worked tasks, followed by the new instruction;
   the model writes the rest, beginning with an input of its own if the task needs one. If the answer lacks
   the response marker, the model is asked again with other examples, three times in all.

The examples that pass the filters are returned, with the fate of every candidate. Decoding is greedy, so all
variety comes from the draw of demonstrations, and a prompt that has been answered is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from fedloom.client import Words
from fedloom.data.example import Example
from fedloom.data.text import folded, length, words
from fedloom.errors import ConfigError
from fedloom.rng import Name, numpy_stream
from fedloom.state import AdapterState
from fedloom.steps import Generate, Steps
from fedloom.synthesis.candidates import KEPT, Candidate, Synthesis
from fedloom.synthesis.filters import Filters, LocalTexts

LONGEST_CONTEXT = 2048  # tokens of a prompt and its answer together, even if the model reads more
NO_INPUT = ("<noinput>", "noinput", "none", "n/a")  # how models say that a task needs no input


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The text of the two prompts. The embedded base model was pretrained on the defaults."""

    list_opening: str = "Come up with a list of tasks."
    list_item: str = "Task {number}: {instruction}"
    worked_opening: str = "Here is a list of tasks.\n"
    worked_item: str = "Task {number}\nInstruction: {instruction}\n"
    input: str = "Input:"
    output: str = "Output:"
    item_end: str = "\n\n"  # ends a worked task; inside a demonstration a newline replaces it

    def instruction_prompt(self, shown: Sequence[Example]) -> str:
        """The client's instructions, each on one line, up to the number of the next."""
        told = [" ".join(e.instruction.split()) for e in shown]
        lines = [self.list_item.format(number=i, instruction=text) for i, text in enumerate([*told, ""], 1)]
        return "\n".join(line for line in [self.list_opening, *lines] if line).rstrip()

    def response_prompt(self, shown: Sequence[Example], instruction: str) -> str:
        """Worked examples, then the new instruction up to where an input or an output begins."""
        items = [self._opened(i, e.instruction) + self._worked(e) for i, e in enumerate(shown, 1)]
        opening = [self.worked_opening] if self.worked_opening else []
        return "\n".join(
            [*opening, *(item + "\n" for item in items), self._opened(len(shown) + 1, instruction)]
        )

    def _opened(self, number: int, instruction: str) -> str:
        return self.worked_item.format(number=number, instruction=self._inline(instruction))

    def _worked(self, e: Example) -> str:
        context = f"{self.input} {self._inline(e.context)}\n" if e.context else ""
        return f"{context}{self.output} {self._inline(e.response)}"

    def _inline(self, text: str) -> str:
        return text.strip().replace(self.item_end, "\n")


@dataclass(frozen=True, kw_only=True)
class SelfInstructWording(Wording):
    """For base models pretrained on the web, whose answers may have several paragraphs."""

    list_opening: str = "Come up with a series of tasks:\n"
    worked_opening: str = "Come up with an output for each of the following tasks. Give an input first where the task needs one.\n"
    item_end: str = "\n\nTask "


WORDINGS: dict[str, type[Wording]] = {"embedded": Wording, "self_instruct": SelfInstructWording}


@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """A synthesizer: call it with a client's examples and the *global* adapter, which is the generator."""

    wording: Wording = Wording()
    filters: Filters = field(default_factory=Filters)
    candidates: int = 32  # instructions to be answered
    attempts: int = 96  # most draws of demonstrations for instructions
    shown: int = 8  # instructions in a list; all of them, permuted, if the client has fewer
    worked: int = 3  # worked examples before a new instruction
    trials: int = 3  # attempts at each answer
    instruction_tokens: int = 64
    response_tokens: int = 512
    context_words: int = 150  # most words in an input that the model writes
    temperature: float = 0.0  # 0: greedy
    repetition_penalty: float = 1.0  # on responses; FedPIT's first version used one
    distinct: Literal["instruction", "sample"] = "instruction"  # "sample": may repeat with another input

    def __post_init__(self) -> None:
        low = [
            f
            for f in (
                "candidates",
                "attempts",
                "shown",
                "worked",
                "trials",
                "instruction_tokens",
                "response_tokens",
            )
            if getattr(self, f) < 1
        ]
        if low:
            raise ConfigError(f"Expected {low[0]} of at least 1, got {getattr(self, low[0])}.")
        if self.distinct not in ("instruction", "sample"):
            raise ConfigError(f'Expected distinct = "instruction" or "sample", got {self.distinct!r}.')

    def check(self, site: Words) -> None:
        """Raises ConfigError if the model's context has no room for a prompt beside an answer."""
        longest = max(self.instruction_tokens, self.response_tokens)
        if _context(site) <= longest:
            raise ConfigError(
                f"A context of {_context(site)} tokens leaves no room for a prompt beside an answer of {longest}. "
                "Lower synthesis.instruction_tokens or synthesis.response_tokens."
            )

    def __call__(
        self,
        examples: Sequence[Example],
        adapter: AdapterState | None,
        words: Words,
        *,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[Synthesis]:
        """Both phases and the filters. Without examples the `Synthesis` is empty. Raises: ConfigError."""
        self.check(words)
        if not examples:
            return Synthesis()
        local = LocalTexts(examples, self.filters)
        drawn = yield from self._instructions(examples, adapter, words, local, seed, stream)
        found = yield from self._responses(drawn.candidates, examples, adapter, words, seed, stream)
        return replace(drawn, candidates=self._filtered(found, local))

    def _instructions(
        self,
        examples: Sequence[Example],
        adapter: AdapterState | None,
        site: Words,
        local: LocalTexts,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[Synthesis]:
        """Phase 1: draw until enough instructions pass, or the attempts are used up."""
        candidates: list[Candidate] = []
        asked: set[tuple[int, ...]] = set()
        passed: set[str] = set()
        good = draws = repeated = 0
        stop = _stop_at(site, "\n")
        while good < self.candidates and draws < self.attempts:
            prompts: list[tuple[int, ...]] = []
            first = draws
            # At least half a batch: continuing one prompt takes as long as continuing many.
            batch = max(self.candidates - good, self.candidates // 2)
            while len(prompts) < batch and draws < self.attempts:
                shown = _draw(seed, examples, self.shown, *stream, "instruction", draws)
                draws += 1
                prompt = _fitting(site, self.wording.instruction_prompt, shown, self.instruction_tokens)
                if self.temperature == 0 and prompt in asked:
                    repeated += 1
                    continue
                asked.add(prompt)
                prompts.append(prompt)
            if not prompts:
                break
            answers: list[list[int]] = yield Generate(
                prompts,
                adapter,
                self.instruction_tokens,
                stop,
                self.temperature,
                ("synthesis", *stream, "instruction", first),
                seed=seed,
            )
            for ids in answers:
                text, ended = _until(site, "\n", ids, self.instruction_tokens)
                fate = (
                    "failed/unfinished"
                    if not ended
                    else "failed/empty"
                    if not text
                    else _fate(self.filters.instruction(text) or local.instruction(text))
                )
                key = " ".join(words(text))
                if fate == KEPT and self.distinct == "instruction" and key in passed:
                    fate = "filtered/duplicate"
                if fate == KEPT and good == self.candidates:
                    fate = "filtered/surplus"
                if fate == KEPT:
                    passed.add(key)
                    good += 1
                name = "/".join(str(part) for part in (*stream, len(candidates)))
                candidates.append(Candidate(Example(text, "", id=f"synthetic:{name}"), fate))
        return Synthesis(tuple(candidates), repeated)

    def _responses(
        self,
        candidates: Sequence[Candidate],
        examples: Sequence[Example],
        adapter: AdapterState | None,
        site: Words,
        seed: int,
        stream: tuple[Name, ...],
    ) -> Steps[list[Candidate]]:
        """Phase 2: answer the instructions that passed; if an answer is malformed, retry with others."""
        found = list(candidates)
        asked: set[tuple[int, ...]] = set()
        waiting = [index for index, c in enumerate(found) if c.fate == KEPT]
        stop = _stop_at(site, self.wording.item_end)
        for trial in range(self.trials):
            prompts: dict[int, tuple[int, ...]] = {}
            for index in waiting:
                instruction = found[index].example.instruction
                shown = _draw(seed, examples, self.worked, *stream, "response", index, trial)
                ask = partial(self.wording.response_prompt, instruction=instruction)
                prompt = _fitting(site, ask, shown, self.response_tokens)
                if self.temperature > 0 or prompt not in asked:
                    prompts[index] = prompt
            if not prompts:
                break
            asked.update(prompts.values())
            answers: list[list[int]] = yield Generate(
                list(prompts.values()),
                adapter,
                self.response_tokens,
                stop,
                self.temperature,
                ("synthesis", *stream, "response", trial),
                self.repetition_penalty,
                seed=seed,
            )
            for index, ids in zip(prompts, answers, strict=True):
                found[index] = self._answered(site, found[index].example, ids)
            waiting = [index for index in waiting if found[index].fate != KEPT]
        return found

    def _answered(self, site: Words, example: Example, ids: Sequence[int]) -> Candidate:
        text, ended = _until(site, self.wording.item_end, ids, self.response_tokens)
        before, marker, response = text.partition(self.wording.output)
        context = before.strip()
        if not marker or (context and not context.startswith(self.wording.input)):
            return Candidate(example, "failed/no-output")
        context = context.removeprefix(self.wording.input).strip()
        if folded(context) in NO_INPUT:
            context = ""
        answered = replace(example, context=context, response=response.strip())
        if not ended:
            return Candidate(answered, "failed/unfinished-output")
        if not answered.response:
            return Candidate(answered, "failed/empty-output")
        if length(words(context)) > self.context_words:
            return Candidate(answered, "failed/long-input")
        return Candidate(answered)

    def _filtered(self, candidates: Sequence[Candidate], local: LocalTexts) -> tuple[Candidate, ...]:
        seen: set[tuple[str, str]] = set()
        out: list[Candidate] = []
        for c in candidates:
            if c.fate == KEPT:
                key = (" ".join(words(c.example.instruction)), " ".join(words(c.example.context)))
                code = self.filters.response(c.example.response) or local.example(c.example)
                c = replace(c, fate=_fate(code or ("duplicate" if key in seen else None)))
                if c.fate == KEPT:
                    seen.add(key)
            out.append(c)
        return tuple(out)


def _draw(seed: int, examples: Sequence[Example], count: int, *name: Name) -> list[Example]:
    order = numpy_stream(seed, "synthesis", *name).permutation(len(examples))
    return [examples[i] for i in order[:count]]


def _context(site: Words) -> int:
    return min(site.positions, LONGEST_CONTEXT)


def _fitting(
    site: Words, render: Callable[[Sequence[Example]], str], shown: Sequence[Example], answer: int
) -> tuple[int, ...]:
    """The prompt with as many examples as fit beside an answer; the longest are dropped first."""
    few = list(shown)
    while True:
        prompt = tuple(site.document_ids(render(few)))
        if len(prompt) + answer <= _context(site) or not few:
            return prompt
        few.remove(max(few, key=lambda e: len(e.instruction) + len(e.context) + len(e.response)))


def _until(site: Words, end: str, ids: Sequence[int], limit: int) -> tuple[str, bool]:
    """The answer up to `end`, and whether it ended: there, or at a stop token."""
    text, found, _ = site.text(ids).lstrip().partition(end)
    return text.strip(), bool(found) or len(ids) < limit


def _stop_at(site: Words, end: str) -> frozenset[int]:
    """Stop tokens. If a single token spells `end`, generation stops there rather than at the limit."""
    last = site.document_ids(f"a{end}")[-1]
    return site.stop | {last} if site.text([last]) == end else site.stop


def _fate(code: str | None) -> str:
    return KEPT if code is None else f"filtered/{code}"
