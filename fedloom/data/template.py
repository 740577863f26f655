"""An example as tokens: one prompt format for training, evaluation and chat, and the loss mask by construction.

A prompt is a row of *parts*: control tokens, and the text between them in which the user's words are
filled in. Control tokens come only from the format itself; whatever a user writes is tokenised as plain
text, so a response that contains `</s>` does not end an answer. Text between two control tokens is
tokenised in one piece, which gives the very ids that the tokenizer gives for the rendered prompt.

The response is tokenised on its own and appended, so that a model is trained on exactly the ids it is
given when it answers, and the mask is known without searching for a marker. So are earlier answers of a
conversation, where they are learnt, too.
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

    `format="auto"` is the tokenizer's own chat template where it has one, else Alpaca's wording. `system`
    is said before the instruction, unless an example has a system turn of its own; a chat template that
    knows no system role gets it as part of the user's first turn. `loss_on="assistant"` also learns the
    answers among an example's earlier turns, `"all"` the whole sequence. `max_length` is the most tokens of
    a training sequence: prompt, response and end. `positions` is what the model reads at once, which bounds
    a prompt that is to be answered.

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

        # What closes a response: text up to the first control token after it, and that token.
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
        """The prompt of an example, or of an instruction and its context, as text to be shown.

        Models are given `prompt_ids`, which may differ from tokenising this text: here a control token
        cannot be told from a user who spells one.
        """
        example = _asked(example, context)
        form, words = self._form(example), self._words(example)
        return "".join(
            self._text.name(part) if isinstance(part, int) else form.fill(part, words)
            for part in (*self._opening, *form.parts)
        )

    def prompt_ids(self, example: Example | str, context: str = "", *, room: int = 0) -> list[int]:
        """What a model is given to answer: what `encode` puts before the response.

        Whole, where that leaves `room` tokens of the model's positions for the answer; else the earliest turns,
        the end of the context, then that of the instruction are cut, but never to less than training shows of
        the same example (of an instruction alone: to less than `max_length` but for 16 tokens).
        """
        return self._given(_asked(example, context), room, trained=isinstance(example, Example))[0]

    def prompt_cut(self, example: Example | str, context: str = "", *, room: int = 0) -> Cut:
        """What `prompt_ids` cuts off."""
        return self._given(_asked(example, context), room, trained=isinstance(example, Example))[1]

    def reading_all(self) -> Template:
        """The same format for sequences as long as the model reads: for measuring, not for training."""
        other = copy.copy(self)
        other.max_length = self.positions
        return other

    @property
    def end_text(self) -> str:
        """How the token that closes a response is written."""
        return str(self._tokenizer.convert_ids_to_tokens(self.end))

    @property
    def around(self) -> tuple[str, str]:
        """What stands before a response, and after it up to and with its end, as text."""
        return self._form(Example("a", "")).lead, self._tail + self.end_text

    def encode(self, example: Example) -> Tokens:
        """Prompt, response, end; the last two are labelled.

        Where that is more than `max_length`, first the earliest turns go, a question with its answer, then
        the end of the context is cut, then the end of the response (which then has no end token, since it does not end there), but the response keeps at
        least 16 tokens; at last the end of the instruction. `truncation` tells which was the last resort.
        """
        return self._encode(example)[0]

    def contrast(self, example: Example) -> tuple[Tokens, Tokens]:
        """The response after its prompt, and the very same tokens after the beginning of text alone.

        In both exactly the response and its end are labelled, whatever `loss_on` says. Where the tokenizer
        begins no text, the end of a text stands before the lone response, as it does in pretraining.
        """
        prompt, _, answer, _ = self._pieces(example)
        beginning = self._text.opening or [self._begin]
        return _labelled(prompt, answer), _labelled(beginning, answer)

    def document_ids(self, text: str) -> list[int]:
        """Text that a base model is to continue, from its beginning, in no format; all of it plain text."""
        return [*self._text.opening, *self._text.ids(text, after=None)]

    def text(self, ids: Sequence[int]) -> str:
        """What a base model has written, blanks and newlines as they are."""
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def truncation(self, example: Example) -> Cut:
        """What `encode` cuts off this example."""
        return self._encode(example)[1]

    def measure(self, examples: Iterable[Example]) -> dict[str, float]:
        """How long the examples are and what `encode` cuts, in counts."""
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
        """Of all that the format puts around a user's words: other prompts have another."""
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
        """The answer as text: up to the first stop token, without special tokens and surrounding blanks."""
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
        """Prompt and what of it is learnt, response with its end, and what was cut to make both fit."""
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
        """The prompt in `wanted` tokens if without the earliest turns and the context's end it gets there, else in
        `at_most` by cutting the instruction's end, too; what of it is learnt; and what was cut."""
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
                f"too-long: the prompt format alone takes {len(ids)} tokens and has room for {max(limit, 0)} of "
                f"prompt.max_length={self.max_length}; raise that, or choose a model that reads more."
            )
        return ids, learnt, cut

    def _shortened(self, text: str, tokens: int) -> str:
        """Without its last `tokens` tokens; what remains may merge into other tokens, so callers look again."""
        pieces = self._text.offsets(text)
        keep = len(pieces) - tokens
        return text[: min(pieces[keep][0], len(text) - 1)] if keep > 0 else ""

    def _prompt(self, example: Example) -> tuple[list[int], list[bool]]:
        """Ids, and which of them are learnt: those of earlier answers, where `loss_on` says so."""
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
        except ModelError:  # a chat template that knows no earlier turns
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
    """One sequence of which the second part is learnt, or all but the first token where there is no first part."""
    ids = (*before, *after)
    unlabelled = max(len(before), 1)
    return Tokens(ids, (False,) * unlabelled + (True,) * (len(ids) - unlabelled))
