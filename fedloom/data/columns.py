"""Guesses which of a file's columns corresponds to which of ours: a suggestion for people, never applied."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence

COMMON = {
    "instruction": (
        "instruction",
        "prompt",
        "question",
        "query",
        "input",
        "problem",
        "task",
        "request",
        "user",
        "human",
        "source_text",
        "message",
        "q",
    ),
    "response": (
        "response",
        "output",
        "answer",
        "completion",
        "target",
        "reply",
        "solution",
        "assistant",
        "chosen",
        "result",
        "target_text",
        "label",
        "text",
        "a",
    ),
    "context": ("context", "input", "passage", "document", "background", "evidence", "article"),
    "category": ("category", "topic", "subject", "qtype", "type", "task", "class", "domain", "label"),
    "owner": (
        "owner",
        "client",
        "client_id",
        "user_id",
        "site",
        "hospital",
        "institution",
        "organisation",
        "source",
    ),
}
MODELS = re.compile(
    r"gpt|claude|davinci|llama|mistral|gemini|palm|bard|qwen|vicuna|alpaca|deepseek", re.IGNORECASE
)
NEEDED = ("instruction", "response")


def nearest(found: Sequence[str]) -> dict[str, str]:
    """ours -> theirs, for those of ours that have a likely match; each of theirs is used once."""
    mapping: dict[str, str] = {}
    if len(several := answers(found)) > 1 and not {"response", "output", "answer"} & set(found):
        mapping["response"] = several[0]
    for close in (False, True):  # common names first, then similar ones
        for ours, names in COMMON.items():
            left = [name for name in found if name not in mapping.values()]
            if ours in mapping or (close and ours not in NEEDED):
                continue
            if name := _likely(names, left, close=close):
                mapping[ours] = name
    if "response" not in mapping and several:
        mapping["response"] = several[0]
    return {ours: mapping[ours] for ours in COMMON if ours in mapping}


def answers(found: Sequence[str]) -> list[str]:
    """Columns named after models, as in files where several models answered the same questions."""
    return [name for name in found if MODELS.search(name)]


def advice(found: Sequence[str], *, source: str, known: Sequence[str] = (), key: str = "data.columns") -> str:
    """The setting to use, ready to paste. `known`: all sources; one with fixed columns becomes a table."""
    for chat in ("messages", "conversations"):
        if chat in found and chat in known:
            return f'That is chat data: data.source = "{chat}".'
    mapping = nearest(found)
    other = "" if source in ("table", "hub") or key != "data.columns" else 'data.source = "table", '
    if not all(ours in mapping for ours in NEEDED):
        return f"Name the columns to learn from: {other}{key} = {{ instruction = ..., response = ... }}."
    renamed = {ours: theirs for ours, theirs in mapping.items() if ours != theirs or ours in NEEDED}
    several = answers(found)
    choice = (
        f" It has the answers of {len(several)} models ({', '.join(several)}); choose one as the response."
        if len(several) > 1
        else ""
    )
    return f"Perhaps: {other}{key} = {_toml(renamed)}.{choice}"


def _likely(names: Sequence[str], found: Sequence[str], *, close: bool) -> str | None:
    plain = {re.sub(r"[\W_]+", "", name).lower(): name for name in reversed(found)}
    for name in names:
        if (bare := name.replace("_", "")) in plain:
            return plain[bare]
    if close:
        for name in names:
            if len(name) > 3 and (like := difflib.get_close_matches(name, list(plain), n=1, cutoff=0.75)):
                return plain[like[0]]
            if len(name) > 3 and (holding := [p for p in plain if name in p]):
                return plain[holding[0]]
    return None


def _toml(mapping: Mapping[str, str]) -> str:
    return (
        "{ "
        + ", ".join(f"{ours} = {json.dumps(theirs, ensure_ascii=False)}" for ours, theirs in mapping.items())
        + " }"
    )
