"""A tokenizer's chat template as text with slots for a user's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from fedloom.errors import ModelError

# Slots: where the user's words go. Private-use characters, so that no chat template touches them.
INSTRUCTION, CONTEXT, RESPONSE, SYSTEM = "\ue000", "\ue001", "\ue002", "\ue003"


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
