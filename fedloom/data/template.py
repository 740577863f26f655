"""An example as tokens: one prompt format for training, evaluation and chat, and the loss mask by construction.

A prompt is a row of *parts*: control tokens, and the text between them in which the user's words are
filled in. Control tokens come only from the format itself; whatever a user writes is tokenised as plain
text, so a response that contains `</s>` does not end an answer. Text between two control tokens is
tokenised in one piece, which gives the very ids that the tokenizer gives for the rendered prompt.

The response is tokenised on its own and appended, so that a model is trained on exactly the ids it is
given when it answers, and the mask is known without searching for a marker.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from fedloom.data.chat_template import CONTEXT, INSTRUCTION, RESPONSE, SYSTEM, read_chat_template
from fedloom.data.example import Example
from fedloom.data.tokenizing import Part, TextTokenizer
from fedloom.errors import DataError, ModelError
from fedloom.steps import Tokens

Format = Literal["auto", "chat", "alpaca", "plain"]
Cut = Literal["none", "context", "response", "instruction"]
_SLOT = re.compile(f"[{INSTRUCTION}{CONTEXT}{RESPONSE}{SYSTEM}]")

SHORTEST_CUT = 16  # tokens of a response that truncation never removes

# Stanford Alpaca's wording (Taori et al. 2023), with alpaca-lora's newline after the last line, as FedIT uses it.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    f"request.\n\n### Instruction:\n{INSTRUCTION}\n\n### Response:\n"
)
ALPACA_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{INSTRUCTION}\n\n### Input:\n{CONTEXT}\n\n### Response:\n"
)
PLAIN = f"Instruction: {INSTRUCTION}\nResponse:"
PLAIN_WITH_CONTEXT = f"Instruction: {INSTRUCTION}\nInput: {CONTEXT}\nResponse:"


class Template:
    """Turns examples into tokens in one format.

    `format="auto"` is the tokenizer's own chat template where it has one, else Alpaca's wording. `system`
    is said before the instruction; a chat template that knows no system role gets it as part of the
    user's turn. `loss_on="all"` also learns the prompt. `max_length` is the most tokens of a training
    sequence: prompt, response and end. `positions` is what the model reads at once, which bounds a prompt
    that is to be answered.

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
        loss_on: Literal["response", "all"] = "response",
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
        self._trim = False
        self._opening: list[int] = []  # a chat template writes its own

        if format == "chat":
            forms = [read_chat_template(tokenizer, system, with_context=flag) for flag in (False, True)]
            self._parts = {bool(i): self._text.split(form.prompt) for i, form in enumerate(forms)}
            self._trim, self._lead, tail = forms[0].trims, forms[0].lead, self._text.split(forms[0].tail)
        else:
            texts = (ALPACA, ALPACA_WITH_CONTEXT) if format == "alpaca" else (PLAIN, PLAIN_WITH_CONTEXT)
            said = f"{SYSTEM}\n\n" if system else ""
            self._parts = {bool(i): self._text.split(said + text) for i, text in enumerate(texts)}
            self._opening = self._text.opening
            self._lead, tail = ("" if format == "alpaca" else " "), []

        # What closes a response: text up to the first control token after it, and that token.
        closing = next((i for i, part in enumerate(tail) if isinstance(part, int)), None)
        self._tail = "".join(str(part) for part in tail[:closing]) if closing is not None else ""
        self._closing = None if closing is None else tail[closing]
        end = tail[closing] if closing is not None else tokenizer.eos_token_id
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
        instruction = example if isinstance(example, str) else example.instruction
        context = context if isinstance(example, str) else example.context
        words = self._words(instruction, context)
        return "".join(
            self._text.name(part) if isinstance(part, int) else _fill(part, words)
            for part in (*self._opening, *self._parts[bool(context)])
        )

    def prompt_ids(self, example: Example | str, context: str = "", *, room: int = 0) -> list[int]:
        """What a model is given to answer: what `encode` puts before the response.

        Whole, where that leaves `room` tokens of the model's positions for the answer; else the end of the
        context, then of the instruction, is cut, but never to less than training shows of the same example
        (of an instruction alone: to less than `max_length` but for 16 tokens).
        """
        return self._given(example, context, room)[0]

    def prompt_cut(self, example: Example | str, context: str = "", *, room: int = 0) -> Cut:
        """What `prompt_ids` cuts off."""
        return self._given(example, context, room)[1]

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
        return self._lead, self._tail + self.end_text

    def encode(self, example: Example) -> Tokens:
        """Prompt, response, end; the last two are labelled.

        Where that is more than `max_length`, first the end of the context is cut, then the end of the
        response (which then has no end token, since it does not end there), but the response keeps at
        least 16 tokens; at last the end of the instruction. `truncation` tells which was the last resort.
        """
        return self._encode(example)[0]

    def contrast(self, example: Example) -> tuple[Tokens, Tokens]:
        """The response after its prompt, and the very same tokens after the beginning of text alone.

        In both exactly the response and its end are labelled, whatever `loss_on` says. Where the tokenizer
        begins no text, the end of a text stands before the lone response, as it does in pretraining.
        """
        prompt, answer, _ = self._pieces(example)
        beginning = self._text.opening or [self._begin]
        return _labelled(prompt, answer), _labelled(beginning, answer)

    def document_ids(self, text: str) -> list[int]:
        """Text that a base model is to continue, from its beginning, in no format; all of it plain text."""
        return [*self._text.opening, *self._text.ids(text, after=None)]

    def truncation(self, example: Example) -> Cut:
        """What `encode` cuts off this example."""
        return self._encode(example)[1]

    def measure(self, examples: Iterable[Example]) -> dict[str, float]:
        """How long the examples are and what `encode` cuts, in counts."""
        cuts: dict[Cut, int] = {"none": 0, "context": 0, "response": 0, "instruction": 0}
        lengths, labelled = [], 0
        for example in examples:
            tokens, cut = self._encode(example)
            cuts[cut] += 1
            lengths.append(len(tokens.ids))
            labelled += tokens.targets
        total = sum(lengths)
        return {
            "examples": len(lengths),
            "context_cut": cuts["context"],
            "response_cut": cuts["response"],
            "instruction_cut": cuts["instruction"],
            "tokens_mean": total / max(len(lengths), 1),
            "tokens_max": max(lengths, default=0),
            "labelled_share": labelled / max(total, 1),
        }

    def sha256(self) -> str:
        """Of all that the format puts around a user's words: other prompts have another."""
        parts = [self._opening, self._parts[False], self._parts[True], self.system, self._lead, self._tail, self.end]
        return hashlib.sha256(json.dumps([*parts, self._trim]).encode()).hexdigest()

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
        prompt, answer, cut = self._pieces(example)
        if self.loss_on == "all":
            return _labelled(prompt[:1], [*prompt[1:], *answer]), cut
        return _labelled(prompt, answer), cut

    def _given(self, example: Example | str, context: str, room: int) -> tuple[list[int], Cut]:
        instruction = example if isinstance(example, str) else example.instruction
        context = context if isinstance(example, str) else example.context
        ids = self._prompt_ids(instruction, context)
        if len(ids) <= self.positions - room:
            return ids, "none"
        trained = (
            min(self.max_length, self.positions) - SHORTEST_CUT
            if isinstance(example, str)
            else min(len(self._pieces(example)[0]), self.positions)
        )
        return self._fit_prompt(instruction, context, max(self.positions - room, trained))

    def _pieces(self, example: Example) -> tuple[list[int], list[int], Cut]:
        """Prompt, response with its end, and what was cut to make both fit."""
        last = self._parts[bool(example.context)][-1]
        text = example.response.strip() if self._trim else example.response
        answer = self._text.ids(self._lead + text + self._tail, after=last, before=self._closing)
        shortest = min(SHORTEST_CUT, len(answer) + 1)  # a short answer keeps its end, too
        prompt, cut = self._fit_prompt(
            example.instruction,
            example.context,
            self.max_length - len(answer) - 1,
            at_most=self.max_length - shortest,
        )
        kept = [*answer, self.end][: self.max_length - len(prompt)]
        if cut != "instruction" and len(kept) <= len(answer):
            cut = "response"
        return prompt, kept, cut

    def _fit_prompt(
        self, instruction: str, context: str, wanted: int, *, at_most: int | None = None
    ) -> tuple[list[int], Cut]:
        """The prompt in `wanted` tokens if cutting the context's end gets it there, else in `at_most` by
        cutting the instruction's end too; and what was cut."""
        limit = wanted if at_most is None else at_most
        ids = self._prompt_ids(instruction, context)
        cut: Cut = "none"
        while len(ids) > wanted and context:
            context = self._shortened(context, len(ids) - wanted)
            ids, cut = self._prompt_ids(instruction, context), "context"
        while len(ids) > limit and instruction:
            instruction = self._shortened(instruction, len(ids) - limit)
            ids, cut = self._prompt_ids(instruction, context), "instruction"
        if len(ids) > limit:
            raise DataError(
                f"too-long: the prompt format alone takes {len(ids)} tokens and has room for {max(limit, 0)} of "
                f"prompt.max_length={self.max_length}; raise that, or choose a model that reads more."
            )
        return ids, cut

    def _shortened(self, text: str, tokens: int) -> str:
        """Without its last `tokens` tokens; what remains may merge into other tokens, so callers look again."""
        pieces = self._text.offsets(text)
        keep = len(pieces) - tokens
        return text[: min(pieces[keep][0], len(text) - 1)] if keep > 0 else ""

    def _prompt_ids(self, instruction: str, context: str) -> list[int]:
        words = self._words(instruction, context)
        ids = list(self._opening)
        parts: list[Part | None] = [None, *self._parts[bool(context)], None]
        for before, part, after in zip(parts, parts[1:], parts[2:], strict=False):
            if isinstance(part, str):
                ids += self._text.ids(_fill(part, words), after=before, before=after)
            elif part is not None:
                ids.append(part)
        return ids

    def _words(self, instruction: str, context: str) -> dict[str, str]:
        words = {INSTRUCTION: instruction, CONTEXT: context, SYSTEM: self.system}
        return {slot: text.strip() for slot, text in words.items()} if self._trim else words


def _labelled(before: Sequence[int], after: Sequence[int]) -> Tokens:
    """One sequence of which the second part is learnt, or all but the first token where there is no first part."""
    ids = (*before, *after)
    unlabelled = max(len(before), 1)
    return Tokens(ids, (False,) * unlabelled + (True,) * (len(ids) - unlabelled))


def _fill(text: str, words: dict[str, str]) -> str:
    return _SLOT.sub(lambda slot: words[slot.group()], text)
