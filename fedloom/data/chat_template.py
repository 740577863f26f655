"""A tokenizer's chat template as text with slots for a user's words.

A prompt must not change from day to day, or a resumed run would train on other prompts than it began with. So
a template that asks for the time always gets the same moment, from a macro with the name of the function it
calls, and a template that draws at random is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError

from fedloom.errors import ModelError

# Slots for people's words: private-use characters, so that no chat template touches them.
INSTRUCTION, CONTEXT, RESPONSE, SYSTEM = "\ue000", "\ue001", "\ue002", "\ue003"
FIRST_TURN, LAST_TURN = 0xF0000, 0xFFFFD  # of the turns before the instruction
BLANKS = "\u2003", "\u2002"  # put around words to find out whether a template strips spaces

NOW = datetime(2024, 7, 26)  # the default date of Llama 3's templates
DIRECTIVES = "aAwdbBmyYHIMSfjUWcxXGuVpzZ"  # of strftime, on every platform; SHORT expresses others by these
SHORT = {
    "F": "%Y-%m-%d",
    "T": "%H:%M:%S",
    "D": "%m/%d/%y",
    "R": "%H:%M",
    "h": "%b",
    "e": "%d",
    "k": "%H",
    "l": "%I",
    "%": "%%",
}


def turn_slot(index: int) -> str:
    """The slot of an earlier turn, counted without a system turn: questions are even, answers are odd."""
    return chr(FIRST_TURN + index)


@dataclass(frozen=True)
class ChatForm:
    """A chat template with slots. A user's message, instruction and context, has one slot."""

    prompt: str  # up to the response
    lead: str  # spaces that the template puts before a response, for the model to generate
    tail: str  # text after a response
    strips: Mapping[str, tuple[bool, bool]]  # slot -> (strips before, strips after): spaces around its words


def read_chat_template(tokenizer: Any, *, turns: int, system: bool) -> ChatForm:
    """Learn the format by rendering slots, which no template can mistake for words that it treats specially.

    `turns` is the number of questions and answers before the instruction. Where a template has no system
    role, the system's words become part of the first question.
    """
    roles = [("user", "assistant")[i % 2] for i in range(turns)]
    said = [(role, turn_slot(i)) for i, role in enumerate(roles)] + [("user", INSTRUCTION)]
    if system:
        (role, first), *others = said
        said = [("system", SYSTEM), *said]
        if _said(tokenizer, said).count(SYSTEM) != 1:
            said = [(role, f"{SYSTEM}\n\n{first}"), *others]

    prompt = _said(tokenizer, said, add_generation_prompt=True)
    full = _said(tokenizer, [*said, ("assistant", RESPONSE)])
    slots = [*map(turn_slot, range(turns)), INSTRUCTION, *([SYSTEM] if system else [])]
    if any(text.count(slot) != 1 for slot in slots for text in (prompt, full)) or full.count(RESPONSE) != 1:
        raise ModelError(
            f"the tokenizer's chat template does not show each of {len(said) + 1} messages exactly once, so it "
            'cannot be trained on; choose format "alpaca" or "plain".'
        )
    before, tail = full.split(RESPONSE)
    # The text between the prompt and a rendered answer. Spaces belong to the answer, so that they are
    # tokenised with its first word; anything else (an empty thinking block) belongs to the prompt.
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    return ChatForm(
        prompt=prompt + (between if between.strip() else ""),
        lead="" if between.strip() else between,
        tail=tail,
        strips=_strips(tokenizer, [*said, ("assistant", RESPONSE)]),
    )


def _strips(tokenizer: Any, said: Sequence[tuple[str, str]]) -> dict[str, tuple[bool, bool]]:
    left, right = BLANKS
    spaced = _said(tokenizer, [(role, f"{left}{words}{right}") for role, words in said])
    strips: dict[str, tuple[bool, bool]] = {}
    for _, words in said:
        first, last = words[0], words[-1]  # two slots if a question contains the system's words
        before = not spaced.partition(first)[0].endswith(left)
        after = not spaced.partition(last)[2].startswith(right)
        strips |= {first: (before, False), last: (before and first == last, after)}
    return strips


def _said(tokenizer: Any, said: Sequence[tuple[str, str]], **options: bool) -> str:
    return _render(tokenizer, [{"role": role, "content": words} for role, words in said], **options) or ""


def _render(
    tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str | None:
    """The template's text, or None where it refuses these messages."""
    try:
        template = _timeless(_source(tokenizer))
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            date_string=f"{NOW:%d %b %Y}",
        )
    except ModelError:
        raise
    except TemplateSyntaxError as broken:
        raise ModelError(f"the tokenizer's chat template is not valid Jinja: {broken.message}") from broken
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):  # all that it may raise
        return None
    return text


def _source(tokenizer: Any) -> str:
    try:
        source: str = tokenizer.get_chat_template()
    except ValueError as unclear:  # several, and none is the default
        raise ModelError(f"the tokenizer's chat template cannot be chosen: {unclear}") from unclear
    return source


@cache
def _timeless(template: str) -> str:
    """The template with a stopped clock: a macro hides transformers' function of that name.

    Jinja drops the newline after the macro, so the rest renders as it would without it.
    """
    words = [value for _, kind, value in Environment().lex(template) if kind in ("name", "operator")]
    for before, word in pairwise(["", *words]):
        if word == "lipsum" or (before, word) == ("|", "random"):
            raise ModelError(
                f"the tokenizer's chat template draws at random ({word}), so prompts would differ from run to run; "
                'choose format "alpaca" or "plain", or a template without it.'
            )
    told = {f"%{of}": NOW.strftime(f"%{of}") for of in DIRECTIVES}
    told |= {f"%{of}": NOW.strftime(long) for of, long in SHORT.items()}
    told |= {f"%-{of[1:]}": says.lstrip("0") or "0" for of, says in told.items() if says.isdigit()}
    clock = "".join(f".replace('{of}', '{says}')" for of, says in told.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{clock} }}}}{{% endmacro %}}\n{template}"
