"""An example as tokens: one prompt format for training, evaluation and chat, and the loss mask by construction.

A prompt is a row of *parts*: control tokens, and the text between them in which the user's words are
filled in. Control tokens come only from the format itself; whatever a user writes is tokenised as plain
text, so a response that contains `</s>` does not end an answer. Text between two control tokens is
tokenised in one piece, which gives the very ids that the tokenizer gives for the rendered prompt.

The response is tokenised on its own and appended, so that a model is trained on exactly the ids it is
given when it answers, and the mask is known without searching for a marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import Tokenizer

from fedloom.data.example import Example
from fedloom.errors import DataError, ModelError
from fedloom.steps import Tokens

Format = Literal["auto", "chat", "alpaca", "plain"]
Cut = Literal["none", "context", "response", "instruction"]
Part = int | str  # a control token, or text with slots

# Slots: where the user's words go. Private-use characters, so that no chat template touches them.
INSTRUCTION, CONTEXT, RESPONSE, SYSTEM = "\ue000", "\ue001", "\ue002", "\ue003"
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
    user's turn. `loss_on="all"` also learns the prompt. `max_length` counts prompt, response and end.

    `stop` holds every token that ends an answer: the tokenizer's end of text and the chat template's end
    of turn. The latter (the former without a chat template) closes every response and is learnt.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        format: Format = "auto",
        max_length: int = 512,
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
        self.loss_on = loss_on
        self.system = system
        self._tokenizer = tokenizer
        self._text = _TextTokenizer(tokenizer)
        self._trim = False

        if format == "chat":
            forms = [_read_chat_template(tokenizer, system, with_context=flag) for flag in (False, True)]
            self._parts = {bool(i): self._text.split(form.prompt) for i, form in enumerate(forms)}
            self._trim, self._lead, tail = forms[0].trims, forms[0].lead, self._text.split(forms[0].tail)
        else:
            texts = (ALPACA, ALPACA_WITH_CONTEXT) if format == "alpaca" else (PLAIN, PLAIN_WITH_CONTEXT)
            said = f"{SYSTEM}\n\n" if system else ""
            self._parts = {
                bool(i): [*self._text.opening, *self._text.split(said + text)] for i, text in enumerate(texts)
            }
            self._lead, tail = ("" if format == "alpaca" else " "), []

        # What closes a response: text up to the first control token after it, and that token.
        closing = next((i for i, part in enumerate(tail) if isinstance(part, int)), None)
        self._tail = "".join(str(part) for part in tail[:closing]) if closing is not None else ""
        end = tail[closing] if closing is not None else tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ModelError(
                "the tokenizer has no end-of-text token, so a model could never learn where an answer ends; "
                "set eos_token in its tokenizer_config.json."
            )
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
            for part in self._parts[bool(context)]
        )

    def prompt_ids(self, instruction: str, context: str = "", *, room: int = 0) -> list[int]:
        """What a model is given to answer: exactly what `encode` puts before the response.

        At most `max_length - room` tokens; the end of the context, then of the instruction, is cut to get there.
        """
        ids, _ = self._fit_prompt(instruction, context, self.max_length - room)
        return ids

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
        return [*self._text.opening, *self._text.ids(text, after=next(iter(self._text.opening), None))]

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

    def _pieces(self, example: Example) -> tuple[list[int], list[int], Cut]:
        """Prompt, response with its end, and what was cut to make both fit."""
        last = self._parts[bool(example.context)][-1]
        text = example.response.strip() if self._trim else example.response
        answer = self._text.ids(self._lead + text + self._tail, after=last)
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
                f"too-long: the prompt format alone takes {len(ids)} tokens and max_length={self.max_length} "
                f"leaves {max(limit, 0)}; raise prompt.max_length."
            )
        return ids, cut

    def _shortened(self, text: str, tokens: int) -> str:
        """Without its last `tokens` tokens; what remains may merge into other tokens, so callers look again."""
        pieces = self._text.offsets(text)
        keep = len(pieces) - tokens
        return text[: min(pieces[keep][0], len(text) - 1)] if keep > 0 else ""

    def _prompt_ids(self, instruction: str, context: str) -> list[int]:
        words = self._words(instruction, context)
        ids: list[int] = []
        before: Part | None = None
        for part in self._parts[bool(context)]:
            ids += [part] if isinstance(part, int) else self._text.ids(_fill(part, words), after=before)
            before = part
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


class _TextTokenizer:
    """Plain text to ids, knowing what stands before it; and format text split at its control tokens."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer; fedloom needs a tokenizer.json beside the "
                "model. Convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        self._first = _plain(described)
        self._later = _plain(_without_prefix_space(described))

        added = tokenizer.added_tokens_decoder
        self._names = {token: entry.content for token, entry in added.items()}
        self._controls = {entry.content: token for token, entry in added.items()}
        # Longest first, so that no control token hides another; blanks beside one go as the tokenizer has it.
        patterns = [
            (r"\s*" if entry.lstrip else "")
            + f"({re.escape(entry.content)})"
            + (r"\s*" if entry.rstrip else "")
            for entry in sorted(added.values(), key=lambda entry: -len(entry.content))
        ]
        self._control = re.compile("|".join(patterns)) if patterns else None

        whole, bare = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (True, False))
        # The beginning of text, where the tokenizer adds one.
        self.opening: list[int] = whole[: _find(whole, bare)]
        self._after_control = self._later
        for content, token in self._controls.items():
            joint = tokenizer(f"{content}a b", add_special_tokens=False).input_ids
            if joint == [token, *_encode(self._first, "a b")] != [token, *_encode(self._later, "a b")]:
                self._after_control = self._first  # this tokenizer puts a blank after control tokens, too
                break

    def ids(self, text: str, *, after: Part | None) -> list[int]:
        """Ids of plain text that follows `after`: nothing, a control token, or more text."""
        if not text:
            return []
        if after is None:
            return _encode(self._first, text)
        return _encode(self._after_control if isinstance(after, int) else self._later, text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `text` begins and ends, in characters."""
        return list(self._later.encode(text, add_special_tokens=False).offsets)

    def name(self, token: int) -> str:
        return self._names[token]

    def split(self, text: str) -> list[Part]:
        """Format text as control tokens and what stands between them."""
        parts: list[Part] = []
        place = 0
        for match in self._control.finditer(text) if self._control else ():
            if text[place : match.start()]:
                parts.append(text[place : match.start()])
            parts.append(self._controls[next(name for name in match.groups() if name)])
            place = match.end()
        return [*parts, text[place:]] if text[place:] else parts


def _plain(described: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text: a user cannot spell a control token
    return tokenizer


def _without_prefix_space(described: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that goes on: none of the blanks some put before the first word."""

    def strip(node: Any) -> Any:
        if isinstance(node, list):
            return [
                strip(item) for item in node if not (isinstance(item, dict) and item.get("type") == "Prepend")
            ]
        if isinstance(node, dict):
            if node.get("type") == "Prepend":
                return None
            fixed = {"prepend_scheme": "never", "add_prefix_space": False}
            return {key: fixed.get(key, strip(value)) for key, value in node.items()}
        return node

    return described | {name: strip(described[name]) for name in ("normalizer", "pre_tokenizer")}


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _find(whole: list[int], part: list[int]) -> int:
    return next(i for i in range(len(whole) + 1) if whole[i : i + len(part)] == part)


@dataclass(frozen=True)
class _ChatForm:
    """A chat template with slots."""

    prompt: str  # up to the response
    lead: str  # blanks the template puts before a response: the model's to say
    tail: str  # what follows a response
    trims: bool  # it strips what users write, so we must


def _read_chat_template(tokenizer: Any, system: str, *, with_context: bool) -> _ChatForm:
    """Learn the format by rendering slots, which no template can mistake for words it treats specially."""
    words = f"{INSTRUCTION}\n\n{CONTEXT}" if with_context else INSTRUCTION
    turn = {"role": "user", "content": words}
    messages = [turn]
    if system:
        messages = [{"role": "system", "content": SYSTEM}, turn]
        if (_render(tokenizer, messages) or "").count(SYSTEM) != 1:
            messages = [{"role": "user", "content": f"{SYSTEM}\n\n{words}"}]

    prompt = _render(tokenizer, messages, add_generation_prompt=True) or ""
    full = _render(tokenizer, [*messages, {"role": "assistant", "content": RESPONSE}]) or ""
    slots = INSTRUCTION + (CONTEXT if with_context else "") + (SYSTEM if system else "")
    if any(prompt.count(slot) != 1 for slot in slots) or full.count(RESPONSE) != 1:
        raise ModelError(
            "the tokenizer's chat template does not show a user's and an assistant's message exactly once "
            'each, so it cannot be trained on; choose format "alpaca" or "plain".'
        )
    before, tail = full.split(RESPONSE)
    # What a rendered answer has between the prompt and its own text. Blanks belong to the answer, so that
    # they are tokenised with its first word; anything else (an empty thinking block) to the prompt.
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    spaced = _render(tokenizer, [{"role": "user", "content": f" {INSTRUCTION} "}]) or ""
    return _ChatForm(
        prompt=prompt + (between if between.strip() else ""),
        lead="" if between.strip() else between,
        tail=tail,
        trims=f" {INSTRUCTION} " not in spaced,
    )


def _render(
    tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str | None:
    """The template's text, or None where it refuses these messages.

    The date that some templates print is fixed, since prompts must not change when a run is resumed.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            date_string="26 Jul 2024",
        )
    except TemplateError:
        return None
    return text
