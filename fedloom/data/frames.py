"""From the bytes of a stream to frames: where a record begins and ends, whatever it holds.

Memory holds one record at a time, or the beginning of a record that is too long. Damage inside a record does
not reach its neighbours; if it is no longer clear where records end, that is an error.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from fedloom.errors import DataError


@dataclass(frozen=True)
class Frame:
    line: int
    raw: bytes  # with its newline; only the beginning of a record that is too long
    length: int  # of the whole record, in bytes
    ended: bool = True  # False: the file stops before the record's newline
    number: int = 0  # of the record, if others precede it on its line; else 0
    keyed: bool = False  # a member of an object: its key comes first

    @property
    def body(self) -> bytes:
        text = self.raw.removesuffix(b"\n").removesuffix(b"\r")
        return text[key.end() :] if self.keyed and (key := _KEY.match(text)) else text


def refuse(name: str, line: int, code: str, reason: str, then: str = "") -> NoReturn:
    raise DataError(f"{name}:{line}: {reason} ({code}). {then}".strip())


def lines(stream: BinaryIO, limit: int) -> Iterator[Frame]:
    line = 1
    while raw := stream.readline(limit + 2):  # the longest record allowed, and its newline
        length, ended = len(raw), raw.endswith(b"\n")
        while not ended and (more := stream.readline(1 << 16)):
            length, ended = length + len(more), more.endswith(b"\n")
        yield Frame(line, raw, length, ended)
        line += 1


def written(stream: BinaryIO, limit: int) -> Iterator[Frame]:
    """The lines that are not blank."""
    return (f for f in lines(stream, limit) if f.raw.strip() or f.length > len(f.raw))


_KEY = re.compile(rb'\s*"((?:[^"\\]|\\.)*+)"\s*:')
_MARK = re.compile(rb'"(?:[^"\\\n]|\\[^\n])*+("?)|[\[\]{},\n]')  # a string, or one structural character
_REST_OF_STRING = re.compile(rb'(?:[^"\\\n]|\\[^\n])*+("?)')
_CLOSES = {b"[": b"]", b"{": b"}"}


def marks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of bytes and the bracket, comma or newline that ends them, found outside strings only.

    The mark is empty where a piece of the stream ends. A newline closes any string, since JSON allows
    none inside one: a missing quote spoils one element and not the rest of the file.
    """
    inside_string = False
    while piece := stream.readline(1 << 16):
        while piece.endswith(b"\\") and (more := stream.read(1)):  # never cut an escape in two
            piece += more
        start = at = 0
        if inside_string and (rest := _REST_OF_STRING.match(piece)):
            at = rest.end()
            inside_string = not rest[1] and at == len(piece)
        for found in _MARK.finditer(piece, at):
            if found[0].startswith(b'"'):
                inside_string = not found[1] and found.end() == len(piece)
            else:
                yield piece[start : found.start()], found[0]
                start = found.end()
        yield piece[start:], b""


def elements(stream: BinaryIO, name: str, limit: int, *, key: str | None = None) -> Iterator[Frame]:
    """One frame for each element of a list or member of an object, valid or not.

    With `key`, of the list or object that the file's object holds under it.
    """
    level = 1 if key is None else 2  # brackets around an element
    line = began = last = 1
    depth = length = count = 0
    opener, inside = b"", False  # of the container
    kept = bytearray()  # the element so far, cut once it is clearly too long
    label = bytearray()  # the text before a bracket, outside the container
    closed = False
    for text, mark in marks(stream):
        opens, closes = mark in _CLOSES, mark in (b"]", b"}")
        if closed and (text.strip() or mark.strip()):
            what = "list" if opener == b"[" else "object"
            refuse(name, line, "json", f"there is text after the end of the {what}")
        if inside:
            ends = depth == level and (closes or mark == b",")
            part = text if ends else text + mark
            if length or part.strip() or ends:
                began = began if length else line
                kept += part[: limit + 3 - len(kept)]
                length += len(part)
            if ends and closes and mark != _CLOSES[opener]:
                refuse(
                    name, line, "json", f"a {mark.decode()!r} closes nothing: a record before it is damaged"
                )
            if ends and (length or count or mark == b","):
                count += 1
                number = count if count > 1 and began == last else 0
                yield Frame(began, bytes(kept.rstrip()), length, True, number, opener == b"{")
                length, kept, last = 0, bytearray(), began
            inside = not (ends and closes)
        elif depth == level - 1:
            label += text[: limit - len(label)]
            if opens and not opener and (key is None or key_of(bytes(label)) == key):
                opener, inside = mark, True
            if mark not in (b"", b"\n"):
                label.clear()
        depth += opens - closes
        closed = closed or (depth == 0 and closes)
        line += mark == b"\n"
    if not closed:
        what = (
            "the list has no end: this record or its ]"
            if opener != b"{"
            else "the object has no end: this record or its }"
        )
        refuse(name, began if length else line, "truncated", what)


def key_of(text: bytes) -> str | None:
    """The key that text before a value ends with."""
    found = _KEY.match(text)
    return found[1].decode("utf-8", "replace") if found else None


def values(stream: BinaryIO, limit: int) -> Iterator[Frame]:
    """One frame for each object at the top level, over any number of lines; commas may separate them."""
    line = began = last = 1
    depth = length = count = 0
    kept = bytearray()
    for text, mark in marks(stream):
        between = depth == 0 and not length and not text.strip() and mark in (b",", b"\n", b"")
        if not between:
            began = began if length else line
            kept += (text + mark)[: limit + 3 - len(kept)]
            length += len(text) + len(mark)
        depth += (mark in _CLOSES) - (mark in (b"]", b"}"))
        if length and mark in (b"]", b"}") and depth <= 0:
            count += 1
            yield Frame(began, bytes(kept), length, True, count if count > 1 and began == last else 0)
            depth, length, kept, last = 0, 0, bytearray(), began
        line += mark == b"\n"
    if kept.strip():
        yield Frame(began, bytes(kept), length, False)


def rows(stream: BinaryIO, delimiter: bytes, limit: int) -> Iterator[tuple[Frame, list[bytes] | None]]:
    """A frame and its columns for each record of a CSV file; None for columns where the quotes are broken.

    A record continues while its quotes are open. If they never close, or close at a wrong place, only its
    first line counts as broken, and the lines after it are read again.
    """
    field = _field(delimiter)
    following_lines = lines(stream, limit)
    again: deque[Frame] = deque()

    def following() -> Frame | None:
        return again.popleft() if again else next(following_lines, None)

    while (first := following()) is not None:
        if not first.raw.strip(b" \r\n"):
            continue
        taken, length = [first], first.length
        is_open = first.raw.count(b'"') % 2 == 1
        while is_open and length <= limit and (more := following()) is not None:
            taken.append(more)
            length += more.length
            is_open ^= more.raw.count(b'"') % 2 == 1
        joined = Frame(first.line, b"".join(f.raw for f in taken), length, taken[-1].ended)
        columns = None if is_open or length > limit + 2 else _columns(joined.body, field)
        if columns is not None:
            yield joined, columns
        else:
            again.extendleft(reversed(taken[1:]))
            yield first, None


def cells(line: bytes, delimiter: bytes) -> list[bytes] | None:
    """The columns of one line; None where its quotes are broken."""
    return _columns(line, _field(delimiter))


def _field(delimiter: bytes) -> re.Pattern[bytes]:
    mark = re.escape(delimiter)
    return re.compile(rb'(?:"([^"]*+(?:""[^"]*+)*+)"|([^"\n' + mark + rb"]*+))(" + mark + rb"|\Z)")


def _columns(body: bytes, field: re.Pattern[bytes]) -> list[bytes] | None:
    columns, at = [], 0
    while found := field.match(body, at):
        columns.append(found[2] if found[1] is None else found[1].replace(b'""', b'"'))
        at = found.end()
        if not found[3]:
            return columns
    return None
