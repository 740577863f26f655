"""Conversations as OpenAI and ShareGPT write them, read strictly: one example a conversation.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

The last answer is the response, the question before it is the instruction, and everything earlier is its
turns. A conversation may begin with one system turn ("developer" is another name for it), or have it in a
field "system" beside the turns. Then questions and answers alternate, and the last turn is an answer. Content
may be a list of parts, if all of them are text; they are joined by newlines. A record may have a category and
an owner. Codes of bad records, besides those of records.py:

    role   a speaker of another name           order  turns in another order, or no answer at the end
    tool   tools, their calls or their answers  part   a part of the content is not text (an image, say)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.example import Example, Role, Turn
from fedloom.data.records import BadRecord, Field, Record

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TOOLS = ("tool", "function", "function_call", "observation", "ipython")  # roles of turns that use tools
CALLS = ("tool_calls", "function_call")  # of a turn
OFFERED = ("tools", "functions")  # of a conversation
LISTS = ("messages", "conversations")  # fields that hold the turns
KEYS = (("role", "content"), ("from", "value"))  # the speaker, and the words
DEMANDS = {
    **{name: Field(required=False, nested=True) for name in (*LISTS, "system")},
    **{name: Field(required=False, blank=True, number=True) for name in ("category", "owner")},
}


class _Unusable(Exception):
    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason


def checked(record: Record | BadRecord) -> Record | BadRecord:
    """The record, or the reason why it is not a conversation to learn from."""
    if isinstance(record, Record):
        try:
            _turns(record.values)
        except _Unusable as bad:
            raw = json.dumps(dict(record.values)).encode()
            return BadRecord(record.place, bad.code, bad.reason, raw, len(raw))
    return record


def example(record: Record) -> Example:
    """A record that was `checked`."""
    *earlier, asked, answered = _turns(record.values)
    category, owner = (_text(record.values.get(name)) for name in ("category", "owner"))
    return Example(
        asked.text, answered.text, category=category, owner=owner, id=str(record.place), turns=tuple(earlier)
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _turns(values: Mapping[str, Any]) -> list[Turn]:
    turns = [_turn(item, f"turn {number}") for number, item in enumerate(_said(values), 1)]
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise _Unusable("type", "'system' is not text")
    if system and system.strip():
        turns.insert(0, Turn("system", system))
    _check_order([turn.role for turn in turns])
    return turns


def _said(values: Mapping[str, Any]) -> Sequence[Any]:
    """The list of turns."""
    names = [name for name in LISTS if name in values]
    if not names:
        raise _Unusable("missing", f"no field 'messages' or 'conversations'; it has {len(values)} others")
    if len(names) > 1:
        raise _Unusable("type", "both 'messages' and 'conversations'; expected one of them")
    if any(values.get(name) not in (None, "", [], {}, "[]", "{}") for name in OFFERED):
        raise _Unusable("tool", "it offers tools, which fedloom does not show to a model")
    said = values[names[0]]
    if said is None:
        raise _Unusable("null", f"{names[0]!r} is null")
    if not isinstance(said, list):
        raise _Unusable("type", f"{names[0]!r} is not a list of turns")
    if not said:
        raise _Unusable("empty", f"{names[0]!r} holds no turn")
    return said


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, dict):
        raise _Unusable("type", f"{where} is not an object")
    if any(item.get(name) for name in CALLS):
        raise _Unusable("tool", f"{where} calls a tool, which fedloom does not train")
    keys = [pair for pair in KEYS if pair[0] in item]
    if len(keys) != 1:
        raise _Unusable(
            "missing",
            f"{where} has {'no' if not keys else 'both'} 'role' {'or' if not keys else 'and'} 'from'",
        )
    [(who, what)] = keys
    speaker = item[who]
    if not isinstance(speaker, str):
        raise _Unusable("type", f"{who!r} of {where} is not text")
    if speaker in TOOLS:
        raise _Unusable("tool", f"{where} is a tool's ({speaker!r}), which fedloom does not show to a model")
    if speaker not in ROLES:
        raise _Unusable("role", f"{where} has an unknown {who!r}; known are {', '.join(ROLES)}")
    if what not in item:
        raise _Unusable("missing", f"{where} has no {what!r}")
    text = _content(item[what], what, where)
    if not text.strip():
        raise _Unusable("empty", f"{what!r} of {where} is blank")
    return Turn(ROLES[speaker], text)


def _content(content: Any, what: str, where: str) -> str:
    if content is None:
        raise _Unusable("null", f"{what!r} of {where} is null")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _Unusable("type", f"{what!r} of {where} is neither text nor a list of parts")
    texts = []
    for number, part in enumerate(content, 1):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _Unusable(
                "part",
                f"part {number} of {where} is not text (an image or a sound, say); only text can be learnt",
            )
        if not isinstance(part.get("text"), str):
            raise _Unusable("type", f"part {number} of {where} has no 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_order(roles: Sequence[Role]) -> None:
    first = 1 if roles[:1] == ["system"] else 0
    for place, role in enumerate(roles[first:]):
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            where = f"turn {place + first + 1}"
            if role == "system":
                raise _Unusable(
                    "order", f"{where} is the system's; expected at most one of these, at the beginning"
                )
            raise _Unusable("order", f"{where} is the {role}'s; expected the {wanted}'s")
    if len(roles) == first or (len(roles) - first) % 2:
        raise _Unusable("order", "it does not end with an answer, so there is nothing to learn")
