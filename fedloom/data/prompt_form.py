"""A prompt format for other tools: the chat template of an exported tokenizer."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from fedloom.data.chat_template import CONTEXT, INSTRUCTION
from fedloom.data.template import Template


def chat_template(template: Template, tokenizer: Any) -> str:
    """A Jinja template with which `apply_chat_template` makes the prompts of training.

    The tokenizer's own template if it does so already. Otherwise one that renders exactly what was trained,
    with the run's system text, and knows only users' turns, which may have a "context" beside their
    "content", and answers.
    """
    if template.format == "chat" and all(
        _own(tokenizer, words) == template.prompt(*pair)
        for words, pair in (
            (INSTRUCTION, (INSTRUCTION,)),
            (f"{INSTRUCTION}\n\n{CONTEXT}", (INSTRUCTION, CONTEXT)),
        )
    ):
        own: str = tokenizer.get_chat_template()
        return own
    trims = f" {INSTRUCTION}" not in template.prompt(f" {INSTRUCTION}")
    bos = tokenizer.bos_token if template.prompt("a").startswith(tokenizer.bos_token or "\0") else ""
    opening = bos + _blank(template, tokenizer, bos)
    plain, with_context = (
        _jinja(opening + template.prompt(*words).removeprefix(bos), trims)
        for words in ((INSTRUCTION,), (INSTRUCTION, CONTEXT))
    )
    lead, end = template.around
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' and message['context'] -%}"
        + with_context
        + "{%- elif message['role'] == 'user' -%}"
        + plain
        + "{%- elif message['role'] == 'assistant' -%}"
        + "{{- "
        + _quoted(lead)
        + " + message['content'] + "
        + _quoted(end)
        + " -}}"
        + "{%- else -%}{{- raise_exception('trained on the turns of users and assistants alone') -}}{%- endif -%}{%- endfor -%}"
    )


def _blank(template: Template, tokenizer: Any, bos: str) -> str:
    """The text needed after the beginning-of-text token so that the rendered prompt becomes the trained ids.

    Some tokenizers put a space before the first word of a text, but not after a token that is spelt out.
    """
    rest = template.prompt("a b").removeprefix(bos)
    wanted = template.prompt_ids("a b")
    return next(
        (
            blank
            for blank in ("", " ")
            if tokenizer(bos + blank + rest, add_special_tokens=False).input_ids == wanted
        ),
        "",
    )


def _own(tokenizer: Any, words: str) -> str | None:
    try:
        said: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return None
    return said


def _jinja(text: str, trims: bool) -> str:
    """Text with slots, as one Jinja expression."""
    names = {INSTRUCTION: "message['content']", CONTEXT: "message['context']"}
    parts = [part for part in re.split(f"([{INSTRUCTION}{CONTEXT}])", text) if part]
    terms = [(f"({names[p]} | trim)" if trims else names[p]) if p in names else _quoted(p) for p in parts]
    return "{{- " + " + ".join(terms) + " -}}"


def _quoted(text: str) -> str:
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"
