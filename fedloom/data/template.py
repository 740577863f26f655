"""An example as tokens: one prompt format for training, evaluation and chat, and an exact loss mask.

A prompt is a row of *parts*: control tokens, and the text between them, with slots for the user's words.
Control tokens come only from the format itself; whatever a user writes is tokenised as plain text, so a
response that contains `</s>` does not end an answer. Text between two control tokens is tokenised in one
piece, which gives exactly the ids that the tokenizer gives for the rendered prompt.

The response is tokenised on its own and appended. So a model is trained on exactly the prompt ids that it
sees when it answers, and the mask is known without searching for a marker. Earlier answers of a conversation
are treated the same way where they are learnt, too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from fedloom.data.chat_template import CONTEXT, INSTRUCTION, RESPONSE, SYSTEM, read_chat_template, turn_slot
from fedloom.data.example import Example, Turn
from fedloom.data.prompt_format import WORDINGS, Form
from fedloom.data.tokenizing import Part, TextTokenizer
from fedloom.errors import DataError, ModelError
from fedloom.steps import Tokens

Format = Literal["auto", "chat", "alpaca", "plain"]
LossOn = Literal["response", "assistant", "all"]
Cut = Literal["none", "turns", "context", "response", "instruction"]

SHORTEST_CUT = 16  # tokens of a response that truncation never removes


class Template:
    """Turns examples into tokens in one format.

    `format="auto"` is the tokenizer's own chat template if it has one, else Alpaca's wording. `system`
    comes before the instruction, unless an example has a system turn of its own; in a chat template without
    a system role it is part of the user's first turn. `loss_on="assistant"` also learns the
    answers among an example's earlier turns, `"all"` the whole sequence. `max_length` is the most tokens of
    a training sequence: prompt, response and end. `positions` is the model's context length, which bounds
    a prompt to be answered.

    `stop` holds every token that ends an answer: the tokenizer's end of text and the chat template's end
    of turn. The latter (the former without a chat template) closes every response and is learnt.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        format: Format = "auto",
        max_length: int = 512,
        positions: int = sys.maxsize,
        loss_on: LossOn = "response",
        system: str = "",
    ):
        if format == "auto":
            format = "chat" if tokenizer.chat_template else "alpaca"
        if format == "chat" and not tokenizer.chat_template:
            raise ModelError(
                'format "chat" needs a tokenizer with a chat template, and this one has none; '
                'use "alpaca" or "plain".'
            )
        self.format: str = format
        self.max_length = max_length
        self.positions = positions
        self.loss_on = loss_on
        self.system = system
        self._tokenizer = tokenizer
        self._text = TextTokenizer(tokenizer)
        self._opening = [] if format == "chat" else self._text.opening  # a chat template writes its own
        self._forms: dict[tuple[int, bool, bool], Form] = {}

        # A response closes with the text up to the first control token after it, and that token.
        self._tail, self._closing, self._strip = "", None, (False, False)
        if format == "chat":
            chat = read_chat_template(tokenizer, turns=0, system=bool(system))
            self._strip = chat.strips.get(RESPONSE, self._strip)
            tail = self._text.split(chat.tail)
            closing = next((i for i, part in enumerate(tail) if isinstance(part, int)), None)
            if closing is not None:
                self._tail, self._closing = "".join(map(str, tail[:closing])), tail[closing]
        end = tokenizer.eos_token_id if self._closing is None else self._closing
        if not isinstance(end, int):
            raise ModelError(
                "the tokenizer has no end-of-text token, so a model could never learn where an answer ends; "
                "set eos_token in its tokenizer_config.json."
            )
        self._text.protect(end)
        self.end = end
        self._begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.stop = frozenset({end} | ({tokenizer.eos_token_id} - {None}))

    def prompt(self, example: Example | str, context: str = "") -> str:
        """The prompt of an example, or of an instruction and its context, as text for people.

        Models get `prompt_ids`, which may differ from the ids of this text: a control token typed by a user
        looks like a real one here.
        """
        example = _asked(example, context)
        form, words = self._form(example), self._words(example)
        return "".join(
            self._text.name(part) if isinstance(part, int) else form.fill(part, words)
            for part in (*self._opening, *form.parts)
        )

    def prompt_ids(self, example: Example | str, context: str = "", *, room: int = 0) -> list[int]:
        """The prompt for a model to answer, as `encode` puts it before the response.

        It is whole if that leaves `room` of the model's positions for the answer. Otherwise the earliest
        turns, the end of the context, then the end of the instruction are cut, but never below what training
        shows of the same example (for an instruction alone: never below `max_length` less 16 tokens).
        """
        return self._given(_asked(example, context), room, trained=isinstance(example, Example))[0]

    def prompt_cut(self, example: Example | str, context: str = "", *, room: int = 0) -> Cut:
        """The part that `prompt_ids` cuts."""
        return self._given(_asked(example, context), room, trained=isinstance(example, Example))[1]

    def reading_all(self) -> Template:
        """The same format for sequences up to the model's context length: for measuring, not for training."""
        other = copy.copy(self)
        other.max_length = self.positions
        return other

    @property
    def end_text(self) -> str:
        """The text of the token that closes a response."""
        return str(self._tokenizer.convert_ids_to_tokens(self.end))

    @property
    def around(self) -> tuple[str, str]:
        """The text before a response, and the text after it, its end included."""
        return self._form(Example("a", "")).lead, self._tail + self.end_text

    def encode(self, example: Example) -> Tokens:
        """Prompt, response, end; the last two are labelled.

        If that exceeds `max_length`, cuts are made in this order: the earliest turns, each question with its
        answer; the end of the context; the end of the response, which keeps at least 16 tokens and loses its
        end token, since it does not end there; the end of the instruction. `truncation` names the last of
        these made.
        """
        return self._encode(example)[0]

    def contrast(self, example: Example) -> tuple[Tokens, Tokens]:
        """The response after its prompt, and the same tokens after the beginning of text alone.

        In both, exactly the response and its end are labelled, whatever `loss_on` says. If the tokenizer has
        no beginning of text, the end-of-text token comes before the lone response, as in pretraining.
        """
        prompt, _, answer, _ = self._pieces(example)
        beginning = self._text.opening or [self._begin]
        return _labelled(prompt, answer), _labelled(beginning, answer)

    def document_ids(self, text: str) -> list[int]:
        """Plain text for a base model to continue: the beginning of text, then the text, in no format."""
        return [*self._text.opening, *self._text.ids(text, after=None)]

    def text(self, ids: Sequence[int]) -> str:
        """The text that a base model has written, with its spaces and newlines."""
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def truncation(self, example: Example) -> Cut:
        """The part of this example that `encode` cuts."""
        return self._encode(example)[1]

    def measure(self, examples: Iterable[Example]) -> dict[str, float]:
        """Counts of examples, of their tokens, and of the cuts that `encode` makes."""
        cuts: dict[Cut, int] = {"none": 0, "turns": 0, "context": 0, "response": 0, "instruction": 0}
        lengths, labelled = [], 0
        for example in examples:
            tokens, cut = self._encode(example)
            cuts[cut] += 1
            lengths.append(len(tokens.ids))
            labelled += tokens.targets
        total = sum(lengths)
        return {
            "examples": len(lengths),
            "turns_cut": cuts["turns"],
            "context_cut": cuts["context"],
            "response_cut": cuts["response"],
            "instruction_cut": cuts["instruction"],
            "tokens_mean": total / max(len(lengths), 1),
            "tokens_max": max(lengths, default=0),
            "labelled_share": labelled / max(total, 1),
        }

    def sha256(self) -> str:
        """Hash of all that the format puts around a user's words: different prompts have different hashes."""
        shapes = [
            (turns, system, context)
            for turns in (0, 2)
            for system in (False, True)
            for context in (False, True)
        ]
        forms = [
            [form.parts, form.lead, sorted(form.strips.items())]
            for form in map(self._form_or_none, shapes)
            if form
        ]
        told = [self.format, self._opening, forms, self.system, self._tail, self.end, self.loss_on]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The answer as text up to the first stop token, without special tokens and outer white space."""
        kept = []
        for token in ids:
            if token in self.stop:
                break
            kept.append(token)
        text: str = self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _encode(self, example: Example) -> tuple[Tokens, Cut]:
        prompt, learnt, answer, cut = self._pieces(example)
        if self.loss_on == "all":
            return _labelled(prompt[:1], [*prompt[1:], *answer]), cut
        tokens = _labelled(prompt, answer)
        return replace(tokens, labelled=(*learnt, *tokens.labelled[len(learnt) :])), cut

    def _given(self, example: Example, room: int, *, trained: bool) -> tuple[list[int], Cut]:
        ids, _ = self._prompt(example)
        if len(ids) <= self.positions - room:
            return ids, "none"
        shown = (
            min(len(self._pieces(example)[0]), self.positions)
            if trained
            else min(self.max_length, self.positions) - SHORTEST_CUT
        )
        ids, _, cut = self._fit_prompt(example, max(self.positions - room, shown))
        return ids, cut

    def _pieces(self, example: Example) -> tuple[list[int], list[bool], list[int], Cut]:
        """The prompt, which of its tokens are learnt, the response with its end, and the cut made."""
        form = self._form(example)
        text = Form((), "", {RESPONSE: self._strip}).stripped(RESPONSE, example.response)
        answer = self._text.ids(form.lead + text + self._tail, after=form.parts[-1], before=self._closing)
        shortest = min(SHORTEST_CUT, len(answer) + 1)  # a short answer keeps its end, too
        prompt, learnt, cut = self._fit_prompt(
            example, self.max_length - len(answer) - 1, at_most=self.max_length - shortest
        )
        kept = [*answer, self.end][: self.max_length - len(prompt)]
        if cut != "instruction" and len(kept) <= len(answer):
            cut = "response"
        return prompt, learnt, kept, cut

    def _fit_prompt(
        self, example: Example, wanted: int, *, at_most: int | None = None
    ) -> tuple[list[int], list[bool], Cut]:
        """The prompt, which of its tokens are learnt, and what was cut.

        Cutting the earliest turns and the end of the context brings it to `wanted` tokens if it can;
        otherwise the end of the instruction is cut, too, to reach `at_most`."""
        limit = wanted if at_most is None else at_most
        ids, learnt = self._prompt(example)
        cut: Cut = "none"
        while len(ids) > wanted and (earlier := _earlier(example)):
            kept = example.turns[: len(example.turns) - len(earlier)]  # what the system says
            example, cut = replace(example, turns=(*kept, *earlier[2:])), "turns"
            ids, learnt = self._prompt(example)
        while len(ids) > wanted and example.context:
            context = self._shortened(example.context, len(ids) - wanted)
            example, cut = replace(example, context=context), "context"
            ids, learnt = self._prompt(example)
        while len(ids) > limit and example.instruction:
            instruction = self._shortened(example.instruction, len(ids) - limit)
            example, cut = replace(example, instruction=instruction), "instruction"
            ids, learnt = self._prompt(example)
        if len(ids) > limit:
            raise DataError(
                f"too-long: the prompt format alone takes {len(ids)} tokens, but only {max(limit, 0)} fit into "
                f"prompt.max_length={self.max_length}; raise that, or choose a model with a longer context."
            )
        return ids, learnt, cut

    def _shortened(self, text: str, tokens: int) -> str:
        """The text without its last tokens. The rest may merge into other tokens, so callers check again."""
        pieces = self._text.offsets(text)
        keep = len(pieces) - tokens
        return text[: min(pieces[keep][0], len(text) - 1)] if keep > 0 else ""

    def _prompt(self, example: Example) -> tuple[list[int], list[bool]]:
        """Ids, and which of them are learnt: those of earlier answers, if `loss_on` says so."""
        form, words = self._form(example), self._words(example)
        answers = (
            [turn_slot(i) for i in range(1, len(_earlier(example)), 2)] if self.loss_on == "assistant" else []
        )
        row = form.learnt(answers, end=self.end) if answers else [(part, False) for part in form.parts]
        ids, learnt = list(self._opening), [False] * len(self._opening)
        parts: list[Part | None] = [None, *(part for part, _ in row), None]
        for (part, learn), before, after in zip(row, parts, parts[2:], strict=False):
            new = (
                [part]
                if isinstance(part, int)
                else self._text.ids(form.fill(part, words), after=before, before=after)
            )
            ids += new
            learnt += [learn] * len(new)
        return ids, learnt

    def _form(self, example: Example) -> Form:
        context = bool(example.context) and self.format != "chat"
        shape = (len(_earlier(example)), bool(self._system(example)), context)
        if shape not in self._forms:
            self._forms[shape] = self._form_of(*shape)
        return self._forms[shape]

    def _form_of(self, turns: int, system: bool, context: bool) -> Form:
        if self.format != "chat":
            wording = WORDINGS[self.format]
            return wording.form(self._text.split, turns=turns, system=system, context=context, end=self.end)
        chat = read_chat_template(self._tokenizer, turns=turns, system=system)
        return Form(self._text.split(chat.prompt), chat.lead, chat.strips)

    def _form_or_none(self, shape: tuple[int, bool, bool]) -> Form | None:
        try:
            return self._form_of(*shape)
        except ModelError:  # a chat template without earlier turns
            return None

    def _system(self, example: Example) -> str:
        said = [turn.text for turn in example.turns[:1] if turn.role == "system"]
        return said[0] if said else self.system

    def _words(self, example: Example) -> dict[str, str]:
        words = {turn_slot(i): turn.text for i, turn in enumerate(_earlier(example))}
        asked = example.instruction
        if self.format == "chat" and example.context:  # one message
            asked = f"{asked}\n\n{example.context}"
        return words | {SYSTEM: self._system(example), INSTRUCTION: asked, CONTEXT: example.context}


def _asked(example: Example | str, context: str) -> Example:
    return Example(example, "", context) if isinstance(example, str) else example


def _earlier(example: Example) -> tuple[Turn, ...]:
    """Questions and answers before the instruction."""
    return tuple(turn for turn in example.turns if turn.role != "system")


def _labelled(before: Sequence[int], after: Sequence[int]) -> Tokens:
    """One sequence whose second part is learnt, or all but the first token if there is no first part."""
    ids = (*before, *after)
    unlabelled = max(len(before), 1)
    return Tokens(ids, (False,) * unlabelled + (True,) * (len(ids) - unlabelled))
