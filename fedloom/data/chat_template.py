"""A tokenizer's chat template as text with slots for a user's words.

A prompt must not change from day to day, else a run that is resumed trains on others than it began with. So a
template that asks for the time is told one moment, by a macro of the name of the function it calls, and one
that draws at random is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError

from fedloom.errors import ModelError

# Slots: where the user's words go. Private-use characters, so that no chat template touches them.
INSTRUCTION, CONTEXT, RESPONSE, SYSTEM = "\ue000", "\ue001", "\ue002", "\ue003"

NOW = datetime(2024, 7, 26)  # the default date of Llama 3's templates
DIRECTIVES = "aAwdbBmyYHIMSfjUWcxXGuVpzZ"  # of strftime, which every platform has; and in terms of them:
SHORT = {"F": "%Y-%m-%d", "T": "%H:%M:%S", "D": "%m/%d/%y", "R": "%H:%M", "h": "%b", "e": "%d", "k": "%H", "l": "%I", "%": "%%"}


@dataclass(frozen=True)
class ChatForm:
    """A chat template with slots."""

    prompt: str  # up to the response
    lead: str  # blanks the template puts before a response: the model's to say
    tail: str  # what follows a response
    trims: bool  # it strips what users write, so we must


def read_chat_template(tokenizer: Any, system: str, *, with_context: bool) -> ChatForm:
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
    return ChatForm(
        prompt=prompt + (between if between.strip() else ""),
        lead="" if between.strip() else between,
        tail=tail,
        trims=f" {INSTRUCTION} " not in spaced,
    )


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
        raise ModelError(f"the tokenizer's chat template is no valid Jinja: {broken.message}") from broken
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):  # whatever a template does
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
    """The template with a clock that stands still: a macro hides transformers' function of that name.

    Jinja drops the end of the macro's line, so nothing else is rendered than without it.
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
