"""Which shape of JSON a file has, judged by its content and not by its name.

    one object a line                              .jsonl as it should be
    a list of objects                              .json as it should be, under any name
    objects one after another                      pretty-printed, or several on a line
    {"data": [...]}, {"train": {"id": ...}}        an object that holds the records under a key
    {"id": {...}, "id": {...}}                     an object of records by id

If several keys hold records, the user is asked which one is meant; a file of columns instead of records is
refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from fedloom.data.frames import Frame, key_of, marks, refuse, written
from fedloom.errors import DataError

KEPT = 1000  # keys of an object that are examined one by one
TRIED = 200  # lines searched for a whole object


@dataclass(frozen=True)
class Shape:
    kind: Literal["lines", "elements", "values"]
    key: str | None = None  # of the elements in the file's object
    said: str = ""  # for the user, if the file's name suggests otherwise


LINES = Shape("lines")
Open = Callable[[], AbstractContextManager[BinaryIO]]


def recognise(
    open_: Open,
    name: str,
    *,
    suffix: str,
    required: Sequence[str],
    nested: Sequence[str] = (),
    limit: int,
    wanted: str | None = None,
) -> Shape:
    """The shape of a file that `open_` opens anew each time; `wanted` is the key that the user named.

    A record has all fields of `required`, or one of `nested`, whose lists are not lists of records. Reads two
    lines, and the whole file only if it is one object or several.
    """
    with open_() as stream:
        found = written(stream, limit)
        first, second = next(found, None), next(found, None)
    by_line = suffix != ".json"
    start = b"" if first is None else first.body.strip()
    if re.match(rb"//|/\*|#", start) and not by_line:
        refuse(name, first.line if first else 1, "json", "a comment, which JSON does not have")
    if first is None or start[:1] not in (b"[", b"{"):
        return _lines(wanted, name, by_line)
    if start[:1] == b"[":
        whole = second is not None and _whole(first)
        if by_line and (whole or start[1:].lstrip()[:1] not in (b"", b"{", b"]")):
            return _lines(wanted, name, by_line)
        if wanted is not None:
            raise DataError(
                f'{name}: data.field = "{wanted}", but the file is a list; leave the setting out (field).'
            )
        return Shape("elements", said="read as a list of records" if by_line else "")
    if second is not None and (_whole(first) or not _goes_on(start, second)):
        if not by_line:
            _some_line_is_whole(open_, name, limit)
        return _lines(wanted, name, by_line)
    with open_() as stream:
        outline = _outline(stream)
    if outline.values == 0 and second is None and first.length <= limit:
        return LINES  # one line that breaks off
    return _of_object(outline, name, required, nested, wanted, one_line=second is None)


def _lines(wanted: str | None, name: str, by_line: bool) -> Shape:
    if wanted is not None:
        raise DataError(
            f'{name}: data.field = "{wanted}", but the file holds one object a line; leave the setting out (field).'
        )
    return LINES if by_line else Shape("lines", said="read as JSON lines, one object a line")


@dataclass
class _Part:
    key: str
    opener: bytes  # empty: neither a list nor an object
    children: Counter[bytes] = field(default_factory=Counter)  # by how they open

    @property
    def holds_records(self) -> bool:
        return bool(self.children[b"{"]) and set(self.children) == {b"{"}

    def __str__(self) -> str:
        what = "list" if self.opener == b"[" else "object"
        return f"{self.key!r} (a{'n' if what == 'object' else ''} {what} of {self.children.total():,})"


@dataclass
class _Outline:
    """The top two levels of a file: the number of values, and the members of the first if it is an object."""

    values: int = 0
    members: int = 0
    others: int = 0  # members that are not objects
    keyless: int | None = None  # the line of the first member without a key
    parts: list[_Part] = field(default_factory=list)  # the first members


def _outline(stream: BinaryIO) -> _Outline:
    found = _Outline()
    depth, part, line = 0, _Part("", b""), 1
    before = bytearray()  # the text before a mark, on the same level
    for text, mark in marks(stream):
        opens, closes = mark in (b"[", b"{"), mark in (b"]", b"}")
        if depth in (1, 2):
            before += text[: 4096 - len(before)]
            if opens or ((mark == b"," or closes) and before.strip()):
                if depth == 2:
                    part.children[mark if opens else b""] += 1
                elif found.values == 0:
                    if (key := key_of(bytes(before))) is None and found.keyless is None:
                        found.keyless = line
                    part = _Part(key or "", mark if opens else b"")
                    found.members += 1
                    found.others += part.opener != b"{"
                    if len(found.parts) < KEPT:
                        found.parts.append(part)
            if opens or closes or mark == b",":
                before.clear()
        depth = max(0, depth + opens - closes)
        line += mark == b"\n"
        if closes and depth == 0:
            found.values += 1
    return found


def _of_object(
    outline: _Outline,
    name: str,
    required: Sequence[str],
    nested: Sequence[str],
    wanted: str | None,
    *,
    one_line: bool,
) -> Shape:
    if outline.values > 1:
        return Shape("values", said="read as objects that follow one another")
    if outline.keyless is not None:
        refuse(
            name,
            outline.keyless,
            "json",
            "not JSON: expected a key before this; JSON has no comments either",
        )
    parts = {p.key: p for p in outline.parts}
    if wanted is not None:
        if wanted not in parts or not parts[wanted].opener:
            raise DataError(
                f'{name}: data.field = "{wanted}" is not a list or object in it; its keys are {_some(list(parts))} (field).'
            )
        return Shape("elements", wanted, f"read as the records under {wanted!r}")
    ours = [parts[k] for k in required if k in parts]
    if (ours and len(ours) == len(required) and all(p.opener for p in ours)) or (
        {"columns", "data"} <= parts.keys() and set(parts["data"].children) == {b"["}
    ):
        raise DataError(
            f"{name}: expected records, got columns (shape). Save it record by record; in pandas: "
            'to_json(path, orient="records", lines=True).'
        )
    if ours or any(k in parts for k in nested):
        return Shape("values", said="" if one_line else "read as one object over several lines")
    holding = [p for p in outline.parts if p.holds_records or (p.opener == b"[" and not p.children)]
    if len(holding) > 1 and (any(p.opener == b"[" for p in holding) or len(holding) == outline.members):
        raise DataError(
            f"{name}: several keys hold records (shape): {_some(list(map(str, holding)))}. "
            f'Say which one is meant, such as data.field = "{max(holding, key=lambda p: p.children.total()).key}".'
        )
    if len(holding) == 1 and (holding[0].opener == b"[" or outline.members - outline.others == 1):
        rest = [p.key for p in outline.parts if p is not holding[0]]
        unread = f"; not read: {_some(rest)}" if rest else ""
        return Shape("elements", holding[0].key, f"read as the records under {holding[0].key!r}{unread}")
    if outline.members and not outline.others:
        return Shape("elements", said=f"read as an object of {outline.members:,} records by id")
    return Shape("values", said="" if one_line else "read as one object over several lines")


def _whole(frame: Frame) -> bool:
    try:
        return isinstance(json.loads(frame.body), dict | list)
    except (ValueError, RecursionError):
        return False


_INSIDE = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[][{}]', re.DOTALL)


def _goes_on(start: bytes, second: Frame) -> bool:
    """Could JSON that begins with the line `start` continue on the next? If not, that line is damaged."""
    opened: list[bytes] = []
    for found in _INSIDE.finditer(start):
        if found[0] in (b"[", b"{"):
            opened.append(found[0])
        elif found[0] in (b"]", b"}") and opened:
            opened.pop()
    after = second.body.lstrip()[:1]
    if not opened:
        return after in (b"{", b",") and _whole_start(start)
    if start[-1:] == b",":
        return after == b'"' or opened[-1] == b"["
    return start[-1:] in b"{[:" or after in (b",", b"]", b"}")


def _whole_start(start: bytes) -> bool:
    """Does the line begin with a whole object, followed by another on the same line?"""
    try:
        _, end = json.JSONDecoder().raw_decode(start.decode())
    except (ValueError, RecursionError):
        return False
    return start[end:].lstrip()[:1] in (b"{", b",")


def _some_line_is_whole(open_: Open, name: str, limit: int) -> None:
    """Refuses a .json file that is not JSON: read line by line, every line would be a complaint."""
    with open_() as stream:
        for _, frame in zip(range(TRIED), written(stream, limit), strict=False):
            if _whole(frame):
                return
    with open_() as stream:
        text = stream.read(1 << 20).decode("utf-8", "replace")
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
        line, reason = 1, "neither JSON nor JSON lines"
    except json.JSONDecodeError as error:
        line = error.lineno + text[: len(text) - len(text.lstrip())].count("\n")
        rest = error.doc[error.pos :].lstrip()
        comment = rest.startswith(("//", "/*", "#"))
        reason = "a comment, which JSON does not have" if comment else f"not JSON: {error.msg}"
    except RecursionError:
        line, reason = 1, "nested too deep"
    refuse(name, line, "json", reason)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
