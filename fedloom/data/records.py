"""Read foreign JSONL, JSON, CSV and TSV files strictly, and name every bad record by file and line.

Python's own readers take NaN, duplicate keys, lone surrogates and rows of any width. A model would be
trained on whatever came of that, so nothing of it passes here. A record is bad for one reason, the first
that is found; the good records around it are unharmed. What damages a file as a whole (it is missing, an
archive is corrupt, a JSON list is never closed) is an error whatever the policy, since nobody can say how
many records it costs.

The codes of bad records:

    long       longer than `max_bytes`             missing    a required field is absent
    utf8       not UTF-8                           null       a required field is null
    bom        a byte order mark inside the file   type       a field is not text
    control    NUL or another control character    empty      a field that must hold text is blank
    surrogate  half of a surrogate pair            columns    not as many columns as the header (CSV)
    deep       nested deeper than `max_depth`      quote      a quote is not closed, or stray (CSV)
    json       not JSON                            truncated  the last line breaks off
    object     JSON, but not an object             duplicate  a key appears twice in one object
    number     NaN or an infinite number

A byte order mark at the start of a file is dropped, and blank lines hold nothing. White space is kept as
it is in every field. Zero-width and replacement characters inside a text are accepted: published data
sets contain them.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, NoReturn, TypeVar, overload

from fedloom.errors import ConfigError, DataError

T = TypeVar("T")

BOM = b"\xef\xbb\xbf"
FORMATS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
ARCHIVES: dict[str, Callable[[Any], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
SHOWN = 10  # bad records listed in an error; the others are counted


@dataclass(frozen=True, order=True)
class Place:
    file: str
    line: int  # 1 is the first; of a record over several lines, its first

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Record:
    place: Place
    values: Mapping[str, Any]  # all fields of the record, also those nobody asked for


@dataclass(frozen=True)
class BadRecord:
    place: Place
    code: str  # one of those above
    reason: str  # for a reader; never quotes the record
    raw: bytes  # as it stands in the file, cut at `max_bytes`
    length: int  # bytes of the whole record


@dataclass(frozen=True)
class Field:
    """What a record must hold under a name. A field that is not required may be absent or null."""

    required: bool = True
    blank: bool = False  # may be empty or white space
    number: bool = False  # may be a whole number, as labels often are


@dataclass(frozen=True)
class Reading:
    """How strictly to read, and what becomes of bad records.

    "fail" refuses the data and lists what is wrong. "skip" leaves bad records out, counts them, and
    writes them to the file `quarantine`, which then holds training text and stays with its owner. Without
    such a file they are only counted, as a preview does.
    """

    on_bad: Literal["fail", "skip"] = "fail"
    quarantine: Path | None = None
    max_bytes: int = 1 << 20  # of one record
    max_depth: int = 32  # brackets inside brackets

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "skip"):
            raise ConfigError(f'Expected on_bad to be "fail" or "skip", got {self.on_bad!r}.')
        if self.max_bytes < 1 or not 1 <= self.max_depth <= 200:  # Python's own parser stops near 1000
            raise ConfigError(
                "Expected max_bytes of at least 1 and max_depth between 1 and 200, "
                f"got {self.max_bytes} and {self.max_depth}."
            )


@dataclass(frozen=True)
class Loaded(Sequence[T], Generic[T]):
    """A sequence that knows what was left out of it."""

    items: Sequence[T]
    bad: Mapping[str, int]  # code -> records left out; they are in the quarantine file
    duplicates: int  # records that repeat an earlier one exactly; they are kept

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def read_records(
    path: str | Path, fields: Mapping[str, Field], reading: Reading = Reading(), *, name: str | None = None
) -> Iterator[Record | BadRecord]:
    """Every record of one file, good or bad, in its order. Of `reading`, only the limits matter here.

    The suffix decides: .jsonl, .json (a list of objects, or one object a line), .csv or .tsv (quoted as
    RFC 4180 has it, the first line names the columns), each perhaps followed by .xz, .gz or .bz2. Memory
    holds one record at a time. `name` stands for the file in places; by default its path.

    After a broken quote nobody can say where a CSV record ends, so it is reported at its first line and
    reading starts again on the next: no good record is lost, but further lines of the broken one may be
    reported too. Raises DataError for what damages the file as a whole.
    """
    path = Path(path)
    name = str(path) if name is None else name
    plain = path.with_suffix("") if path.suffix.lower() in ARCHIVES else path
    kind = FORMATS.get(plain.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path}: a folder where a file was expected (directory).")
    if kind is None:
        raise DataError(
            f"{path}: cannot tell the format (format); expected a name that ends in {', '.join(FORMATS)}, "
            f"perhaps followed by {', '.join(ARCHIVES)}."
        )
    found = False
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if plain != path:
                file = stack.enter_context(ARCHIVES[path.suffix.lower()](file))
            stream = stack.enter_context(io.BufferedReader(file, 1 << 16))
            if stream.peek(3).startswith(BOM):
                stream.read(3)
            if kind == "json" and stream.peek(1).lstrip()[:1] == b"[":
                records = _parsed(_elements(stream, name, reading), name, fields, reading)
            elif kind in ("json", "jsonl"):
                written = (f for f in _lines(stream, reading) if f.raw.strip() or f.length > len(f.raw))
                records = _parsed(written, name, fields, reading)
            else:
                records = _rows(stream, b"," if kind == "csv" else b"\t", name, fields, reading)
            for record in records:
                found = True
                yield record
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (absent).") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        what = "a corrupt or truncated archive (archive)" if plain != path else "cannot be read (unreadable)"
        raise DataError(f"{path}: {what}: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no record (empty-file).")


def check_row(place: Place, values: Mapping[str, Any], fields: Mapping[str, Field]) -> Record | BadRecord:
    """The same demands on a record that did not come from one of our files."""
    try:
        _check_text(values, fields)
        _check_fields(values, fields)
    except _Fault as fault:
        raw = json.dumps(dict(values), default=repr).encode()
        return BadRecord(place, fault.code, fault.reason, raw, len(raw))
    return Record(place, values)


def load(
    records: Iterable[Record | BadRecord], make: Callable[[Record], T], reading: Reading = Reading()
) -> Loaded[T]:
    """Make something of every good record; do with the bad ones what `reading.on_bad` says.

    With "skip" the quarantine file is always written, and is empty when no record was bad: one line of
    JSON a record with its file, line, code, reason, length, and the record itself under `raw`, or under
    `raw_base64` where it is not UTF-8. Raises DataError under "fail" when any record is bad, after
    reading them all, and under "skip" when none is good.
    """
    items: list[T] = []
    codes: Counter[str] = Counter()
    first: list[BadRecord] = []
    seen: set[bytes] = set()
    with ExitStack() as stack:
        quarantine: Any = None
        if reading.on_bad == "skip" and reading.quarantine is not None:
            quarantine = stack.enter_context(_create(reading.quarantine))
        for record in records:
            if isinstance(record, Record):
                text = json.dumps(dict(record.values), sort_keys=True, default=repr)
                seen.add(hashlib.blake2b(text.encode(), digest_size=16).digest())
                items.append(make(record))
                continue
            codes[record.code] += 1
            if len(first) < SHOWN:
                first.append(record)
            if quarantine is not None:
                quarantine.write(json.dumps(_quarantined(record)) + "\n")
    if codes and (reading.on_bad == "fail" or not items):
        raise DataError(_listing(first, codes, len(items)))
    return Loaded(items, dict(sorted(codes.items())), len(items) - len(seen))


def _listing(first: Sequence[BadRecord], codes: Counter[str], good: int) -> str:
    bad = codes.total()
    lines = [f"{bad:,} of {bad + good:,} records cannot be used:"]
    lines += [f"  {record.place}  {record.code}: {record.reason}" for record in first]
    if bad > len(first):
        lines.append(f"  and {bad - len(first):,} more")
    lines.append("Counts: " + ", ".join(f"{code} {count:,}" for code, count in codes.most_common()) + ".")
    if good:
        lines.append('Fix these records, or leave them out with data.on_bad = "skip".')
    else:
        lines.append("No good record is left. Is this the right file, and are the columns named as in it?")
    return "\n".join(lines)


def _quarantined(record: BadRecord) -> dict[str, Any]:
    raw: dict[str, str]
    try:
        raw = {"raw": record.raw.decode()}
    except UnicodeDecodeError:
        raw = {"raw_base64": base64.b64encode(record.raw).decode()}
    place = record.place
    found = {"file": place.file, "line": place.line, "code": record.code, "reason": record.reason}
    return {**found, "length": record.length, **raw}


def _create(path: Path) -> io.TextIOWrapper:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write the quarantine file {path}: {error.strerror}.") from None


# -- from bytes to frames: where a record begins and ends -------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    line: int
    raw: bytes  # with its line end; of a record that is too long, the beginning
    length: int  # of the whole, in bytes
    ended: bool = True  # False: the file stops before the record's line end

    @property
    def body(self) -> bytes:
        return self.raw.removesuffix(b"\n").removesuffix(b"\r")


class _Fault(Exception):
    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason


def _lines(stream: BinaryIO, reading: Reading) -> Iterator[_Frame]:
    line = 1
    while raw := stream.readline(reading.max_bytes + 2):  # a record of max_bytes, and its line end
        length, ended = len(raw), raw.endswith(b"\n")
        while not ended and (more := stream.readline(1 << 16)):
            length, ended = length + len(more), more.endswith(b"\n")
        yield _Frame(line, raw, length, ended)
        line += 1


_MARK = re.compile(rb'"(?:[^"\\\n]|\\[^\n])*+("?)|[\[\]{},\n]')  # a string, or one mark of structure
_REST_OF_STRING = re.compile(rb'(?:[^"\\\n]|\\[^\n])*+("?)')


def _marks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Bytes and the bracket, comma or line end they run up to, looking for these outside strings only.

    The mark is empty where a piece of the stream ends. A line end closes any string, since JSON allows
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


def _elements(stream: BinaryIO, name: str, reading: Reading) -> Iterator[_Frame]:
    """One frame an element of a JSON list; the elements need not be valid for that."""
    line = began = 1
    depth = length = elements = 0
    kept = bytearray()  # the element so far, and enough of it to see that it is too long
    closed = False
    for text, mark in _marks(stream):
        if closed and (text.strip() or mark.strip()):
            _refuse(name, line, "json", "there is text after the end of the list")
        if depth > 0:
            ends = depth == 1 and mark in (b",", b"]", b"}")
            part = text if ends else text + mark
            if length or part.strip() or ends:
                began = began if length else line
                kept += part[: reading.max_bytes + 3 - len(kept)]
                length += len(part)
            if ends and mark == b"}":
                _refuse(name, line, "json", "a '}' closes nothing: a record before it is damaged")
            if ends and (length or elements or mark == b","):
                yield _Frame(began, bytes(kept.rstrip()), length)
                elements, length, kept = elements + 1, 0, bytearray()
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        closed = closed or (depth == 0 and mark == b"]")
        line += mark == b"\n"
    if not closed:
        _refuse(name, began if length else line, "truncated", "the list has no end: this record or its ]")


def _refuse(name: str, line: int, code: str, reason: str) -> NoReturn:
    raise DataError(f"{Place(name, line)}: {reason} ({code}).")


def _table(stream: BinaryIO, comma: bytes, reading: Reading) -> Iterator[tuple[_Frame, list[bytes] | None]]:
    """A frame and its columns for each record of a CSV file; no columns where the quotes are broken.

    A record goes on while its quotes are open. If they never close, or close at a wrong place, only its
    first line is called broken, and the lines after it are read again.
    """
    field = re.compile(rb'(?:"([^"]*+(?:""[^"]*+)*+)"|([^"\n' + comma + rb"]*+))(" + comma + rb"|\Z)")
    lines = _lines(stream, reading)
    again: deque[_Frame] = deque()

    def following() -> _Frame | None:
        return again.popleft() if again else next(lines, None)

    while (first := following()) is not None:
        if not first.raw.strip(b" \r\n"):
            continue
        taken, length = [first], first.length
        is_open = first.raw.count(b'"') % 2 == 1
        while is_open and length <= reading.max_bytes and (more := following()) is not None:
            taken.append(more)
            length += more.length
            is_open ^= more.raw.count(b'"') % 2 == 1
        joined = _Frame(first.line, b"".join(f.raw for f in taken), length, taken[-1].ended)
        columns = None if is_open or length > reading.max_bytes + 2 else _columns(joined.body, field)
        if columns is not None:
            yield joined, columns
        else:
            again.extendleft(reversed(taken[1:]))
            yield first, None


def _columns(body: bytes, field: re.Pattern[bytes]) -> list[bytes] | None:
    columns, at = [], 0
    while found := field.match(body, at):
        columns.append(found[2] if found[1] is None else found[1].replace(b'""', b'"'))
        at = found.end()
        if not found[3]:
            return columns
    return None


# -- from frames to records: what a frame must hold -------------------------------------------------------


def _parsed(
    frames: Iterable[_Frame], name: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    for frame in frames:
        place = Place(name, frame.line)
        try:
            values = _parse_json(_decode(frame, reading), frame, reading)
            _check_text(values, fields)
            _check_fields(values, fields)
        except _Fault as fault:
            yield BadRecord(place, fault.code, fault.reason, frame.raw, frame.length)
        else:
            yield Record(place, values)


def _rows(
    stream: BinaryIO, comma: bytes, name: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    header: list[str] = []
    for frame, columns in _table(stream, comma, reading):
        place = Place(name, frame.line)
        try:
            _decode(frame, reading)
            if columns is None:
                raise _cut(frame) or _Fault("quote", "a quote is not closed, or stands inside a field")
            cells = [column.decode() for column in columns]
            if not header:
                header = _header(cells, fields)
                continue
            if len(cells) != len(header):
                reason = f"{len(cells)} columns where the header has {len(header)}"
                raise _cut(frame) or _Fault("columns", reason)
            values = dict(zip(header, cells, strict=True))
            _check_fields(values, fields)
        except _Fault as fault:
            if not header:
                _refuse(name, frame.line, "header", f"the first line must name the columns: {fault.reason}")
            yield BadRecord(place, fault.code, fault.reason, frame.raw, frame.length)
        else:
            yield Record(place, values)


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tab and line ends
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[][{}]', re.DOTALL)  # or a string, to pass over


def _cut(frame: _Frame) -> _Fault | None:
    """What is wrong with a record that makes no sense, if the reason is that the file stops in it."""
    return None if frame.ended else _Fault("truncated", "the last line breaks off: it has no line end")


def _decode(frame: _Frame, reading: Reading) -> str:
    if len(frame.body) > reading.max_bytes or frame.length > reading.max_bytes + 2:  # 2: a line end
        raise _Fault("long", f"{frame.length:,} bytes, where the limit is {reading.max_bytes:,}")
    try:
        text = frame.body.decode()
    except UnicodeDecodeError as error:
        half = _cut(frame) if error.reason == "unexpected end of data" else None
        raise half or _Fault("utf8", f"not UTF-8 (byte {error.start + 1} of the record)") from None
    if text.startswith("\ufeff"):
        raise _Fault("bom", "a byte order mark that is not at the start of the file")
    if found := _CONTROL.search(text):
        raise _Fault("control", f"control character U+{ord(found[0]):04X} (character {found.start() + 1})")
    return text


def _parse_json(text: str, frame: _Frame, reading: Reading) -> dict[str, Any]:
    # Measured first: the parser would recurse as deep as a stranger likes.
    if text.count("[") + text.count("{") > reading.max_depth and _depth(text) > reading.max_depth:
        raise _Fault("deep", f"nested deeper than {reading.max_depth} levels")
    try:
        values = json.loads(
            text, object_pairs_hook=_object, parse_constant=_not_a_number, parse_float=_finite_number
        )
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} (character {error.pos + 1})"
        raise _cut(frame) or _Fault("json", reason) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise _Fault("number", "a number with thousands of digits") from None
    if not isinstance(values, dict):
        raise _Fault("object", f"a JSON {_json_type(values)}, not an object")
    return values


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _BRACKET.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise _Fault("duplicate", "a key appears twice in one object")
    return dict(pairs)


def _not_a_number(text: str) -> NoReturn:
    raise _Fault("number", "NaN or Infinity, which JSON does not have")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Fault("number", "a number too large for a float")
    return number


def _header(cells: list[str], fields: Mapping[str, Field]) -> list[str]:
    if not all(cell.strip() for cell in cells):
        raise _Fault("header", "a column has no name")
    if len(set(cells)) < len(cells):
        raise _Fault("header", "two columns have the same name")
    for name, field in fields.items():
        if field.required and name not in cells:
            raise _Fault("header", f"none of its {len(cells)} columns is called {name!r}")
    return cells


def _check_text(values: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """JSON can spell what the bytes of a file could not hold: "\\u0000", "\\ud800"."""
    for name, value in values.items():
        for text in (name, *_strings(value)):
            if found := _UNWANTED.search(text):
                where = f"field {name!r}" if name in fields else "another field"
                if found[0] < "\ud800":
                    raise _Fault("control", f"{where} holds control character U+{ord(found[0]):04X}")
                raise _Fault("surrogate", f"{where} holds half of a surrogate pair")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    for name, field in fields.items():
        value = values.get(name)
        if value is None and not field.required:
            continue
        if name not in values:
            raise _Fault("missing", f"no field {name!r}")
        if value is None:
            raise _Fault("null", f"{name!r} is null")
        if field.number and type(value) is int:
            continue
        if not isinstance(value, str):
            raise _Fault("type", f"{name!r} is a {_json_type(value)}, not text")
        if not field.blank and not value.strip():
            raise _Fault("empty", f"{name!r} is blank")


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
