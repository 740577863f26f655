"""Read foreign JSONL, JSON, CSV and TSV files strictly, and name every bad record by file and line.

Python's own readers accept NaN, duplicate keys, lone surrogates and rows of any width. A model would be
trained on the result, so none of that passes here. A record is bad for one reason, the first one found;
the good records around it are unharmed. Damage to a file as a whole (it is missing, an archive is corrupt,
a JSON list is never closed) is an error whatever the policy, since nobody can say how many records are lost.

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

A byte order mark at the start of a file is dropped, and blank lines are skipped. White space is kept as
it is in every field. Zero-width and replacement characters inside a text are accepted: published data
sets contain them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, NoReturn, TypeVar, overload

from fedloom.data import csv_shape, frames, json_shape, opening
from fedloom.data.frames import Frame, refuse
from fedloom.data.opening import ARCHIVES
from fedloom.errors import ConfigError, DataError

T = TypeVar("T")

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
SHOWN = 10  # causes, or fields, listed in an error; the others are counted


@dataclass(frozen=True, order=True)
class Place:
    file: str
    line: int  # from 1; the first line of a record over several
    number: int = 0  # of the record, if others begin before it on the same line; else 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" (record {self.number})" if self.number else "")


@dataclass(frozen=True)
class Record:
    place: Place
    values: Mapping[str, Any]  # all fields of the record, unused ones included


@dataclass(frozen=True)
class BadRecord:
    place: Place
    code: str  # one of those above
    reason: str  # for a reader; never quotes the record; details of this record alone come last, in ()
    raw: bytes  # as in the file, cut at `max_bytes`
    length: int  # bytes of the whole record
    fields: tuple[str, ...] = ()  # the fields it has, if it lacks one


@dataclass(frozen=True)
class Field:
    """The demands on one field of a record. A field that is not required may be absent or null."""

    required: bool = True
    blank: bool = False  # may be empty or white space
    number: bool = False  # may be a whole number, as labels often are
    nested: bool = False  # may hold anything; its reader looks inside


def _silent(file: str, what: str) -> None:
    return None


def _no_advice(found: Sequence[str]) -> str:
    return ""


@dataclass(frozen=True)
class Reading:
    """How to read, how strictly, what to do with bad records, and where to report them.

    "fail" refuses the data and lists what is wrong. "skip" leaves bad records out, counts them, and
    writes them to the file `quarantine`, which then holds training text and stays with its owner. Without
    such a file, as in a preview, they are only counted.
    """

    on_bad: Literal["fail", "skip"] = "fail"
    quarantine: Path | None = None
    max_bytes: int = 1 << 20  # of one record
    max_depth: int = 32  # brackets inside brackets
    field: str | None = None  # JSON: the key that holds the records, if several could
    delimiter: str | None = None  # CSV; None: inferred from the header
    encoding: str | None = None  # None: UTF-8, or as a byte order mark says
    tell: Callable[[str, str], None] = _silent  # (file or "", what was not as expected)
    advise: Callable[[Sequence[str]], str] = _no_advice  # fields found -> what to do about a missing one

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "skip"):
            raise ConfigError(f'Expected on_bad to be "fail" or "skip", got {self.on_bad!r}.')
        if self.max_bytes < 1 or not 1 <= self.max_depth <= 200:  # Python's own parser stops near 1000
            raise ConfigError(
                "Expected max_bytes of at least 1 and max_depth between 1 and 200, "
                f"got {self.max_bytes} and {self.max_depth}."
            )
        if self.delimiter is not None:
            csv_shape.as_byte(self.delimiter)
        if self.encoding is not None:
            opening.check_encoding(self.encoding)


@dataclass(frozen=True)
class Loaded(Sequence[T], Generic[T]):
    """A sequence that knows what it leaves out."""

    items: Sequence[T]
    bad: Mapping[str, int]  # code -> number of records left out; the quarantine file holds them
    duplicates: int  # records that repeat an earlier one exactly; they are kept
    places: Sequence[Place] = ()  # the origin of each item

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
    """Every record of one file, good or bad, in order. Ignores `reading.on_bad` and `reading.quarantine`.

    The suffix tells JSON from CSV: .jsonl, .ndjson or .json, of any shape of `json_shape`; .csv or .tsv,
    quoted as in RFC 4180, with any delimiter of `csv_shape`, where the first line names the columns; each may
    be followed by .xz, .gz or .bz2. Memory holds one record at a time. `name` stands for the file in places;
    by default it is the path.

    After a broken quote the end of a CSV record is unknown, so the record is reported at its first line and
    reading starts again on the next: no good record is lost, but further lines of the broken one may be
    reported too. Raises DataError for damage to the file as a whole.
    """
    path = Path(path)
    name = str(path) if name is None else name
    suffix = plain_suffix(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder where a file was expected (directory).")
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: cannot tell the format (format); expected a name that ends in {', '.join(FORMATS)}, "
            f"perhaps followed by {', '.join(ARCHIVES)}."
        )
    read = _json if FORMATS[suffix] == "json" else _csv
    found = False
    try:
        for record in read(path, name, suffix, fields, reading):
            found = True
            yield record
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (absent).") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        packed = path.suffix.lower() in ARCHIVES
        what = "a corrupt or truncated archive (archive)" if packed else "cannot be read (unreadable)"
        raise DataError(f"{path}: {what}: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no record (empty-file).")


def plain_suffix(path: Path) -> str:
    """The ending that names the format, without that of an archive."""
    plain = path.with_suffix("") if path.suffix.lower() in ARCHIVES else path
    return plain.suffix.lower()


def _json(
    path: Path, name: str, suffix: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    shape = json_shape.recognise(
        lambda: opening.opened(path, reading.encoding),
        name,
        suffix=suffix,
        limit=reading.max_bytes,
        required=[field for field, its in fields.items() if its.required],
        nested=[field for field, its in fields.items() if its.nested],
        wanted=reading.field,
    )
    if shape.said:
        reading.tell(name, shape.said)
    with opening.opened(path, reading.encoding, partial(reading.tell, name)) as stream:
        if shape.kind == "elements":
            found = frames.elements(stream, name, reading.max_bytes, key=shape.key)
        else:
            found = (frames.values if shape.kind == "values" else frames.written)(stream, reading.max_bytes)
        yield from _parsed(found, name, fields, reading)


def _csv(
    path: Path, name: str, suffix: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    required = [field for field, its in fields.items() if its.required]
    with opening.opened(path, reading.encoding) as stream:
        dialect = csv_shape.recognise(stream, suffix, required, reading.delimiter)
    if dialect.said:
        reading.tell(name, dialect.said)
    with opening.opened(path, reading.encoding, partial(reading.tell, name)) as stream:
        for _ in range(dialect.skipped):
            stream.readline()
        yield from _rows(stream, dialect, name, fields, reading)


def check_row(place: Place, values: Mapping[str, Any], fields: Mapping[str, Field]) -> Record | BadRecord:
    """The same checks for a record from elsewhere than a text file."""
    try:
        _check_text(values, fields)
        _check_fields(values, fields)
    except _Fault as fault:
        raw = json.dumps(dict(values), default=repr).encode()
        return BadRecord(place, fault.code, fault.reason, raw, len(raw), tuple(values))
    return Record(place, values)


def load(
    records: Iterable[Record | BadRecord], make: Callable[[Record], T], reading: Reading = Reading()
) -> Loaded[T]:
    """Call `make` on every good record; treat the bad ones as `reading.on_bad` says.

    With "skip" the quarantine file is always written, and empty if no record was bad. It has one line of
    JSON per record with its file, line, code, reason, length, and the record itself under `raw`, or under
    `raw_base64` if it is not UTF-8. Raises DataError under "fail" if any record is bad, after
    reading them all, and under "skip" if none is good.
    """
    items: list[T] = []
    places: list[Place] = []
    bad = _Bad()
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
                places.append(record.place)
                continue
            bad.add(record)
            if quarantine is not None:
                quarantine.write(json.dumps(_quarantined(record)) + "\n")
    if bad.codes and (reading.on_bad == "fail" or not items):
        raise DataError(bad.listing(len(items), reading))
    if bad.codes:
        reading.tell("", bad.summary(len(items), reading))
    return Loaded(items, dict(sorted(bad.codes.items())), len(items) - len(seen), places)


class _Bad:
    """Bad records by cause: one line per cause, however many records it has."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self._causes: Counter[tuple[str, str]] = Counter()  # code, reason
        self._first: dict[tuple[str, str], BadRecord] = {}
        self._fields: Counter[str] = Counter()  # of records that lack one
        self._bytes = b""  # of some that are not UTF-8

    def add(self, record: BadRecord) -> None:
        cause = record.code, re.sub(r" \([^()]*\)$", "", record.reason)
        self.codes[record.code] += 1
        self._causes[cause] += 1
        self._first.setdefault(cause, record)
        if record.code == "missing":
            self._fields.update(record.fields)
        if record.code == "utf8" and len(self._bytes) < 1 << 16:
            self._bytes += record.raw

    def listing(self, good: int, reading: Reading) -> str:
        bad = self.codes.total()
        lines = [f"{bad:,} of {bad + good:,} records cannot be used:"]
        for cause, count in list(self._causes.items())[:SHOWN]:
            first = self._first[cause]
            often = f"{cause[1]} ({count:,} records, this is the first)" if count > 1 else first.reason
            lines.append(f"  {first.place}  {cause[0]}: {often}")
        if len(self._causes) > SHOWN:
            rest = self._causes.total() - sum(list(self._causes.values())[:SHOWN])
            lines.append(f"  and {rest:,} more, of {len(self._causes) - SHOWN:,} other kinds")
        lines.append(
            "Counts: " + ", ".join(f"{code} {count:,}" for code, count in self.codes.most_common()) + "."
        )
        lines += self._hints(good, reading)
        if good:
            lines.append('Fix these records, or leave them out with data.on_bad = "skip".')
        else:
            lines.append(
                "No good record is left. Is this the right file, and do the settings name its columns?"
            )
        return "\n".join(lines)

    def summary(self, good: int, reading: Reading) -> str:
        bad = self.codes.total()
        causes = [f"{reason} ({count:,})" for (_, reason), count in self._causes.most_common(3)]
        rest = bad - sum(count for _, count in self._causes.most_common(3))
        where = f"; they are in {reading.quarantine.name}" if reading.quarantine else ""
        said = f"{bad:,} of {bad + good:,} records are left out: {'; '.join(causes)}{f'; other causes ({rest:,})' if rest else ''}{where}."
        return " ".join([said, *self._hints(good, reading)])

    def _hints(self, good: int, reading: Reading) -> Iterator[str]:
        if self._fields:
            names = [name for name, _ in self._fields.most_common()]
            advice = "" if good > self._causes.total() else reading.advise(names)
            yield f"Fields of the records that lack one: {shown(names)}. {advice}".strip()
        if self._bytes:
            yield opening.readings(self._bytes)


def shown(names: Sequence[str]) -> str:
    """Names of fields for a message; a name as long as a sentence may be training text and is not quoted."""
    short = [
        n if len(n) <= 40 and len(n.split()) <= 4 else f"(a text of {len(n)} characters)"
        for n in names[:SHOWN]
    ]
    return ", ".join(short) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _quarantined(record: BadRecord) -> dict[str, Any]:
    raw: dict[str, str]
    try:
        raw = {"raw": record.raw.decode()}
    except UnicodeDecodeError:
        raw = {"raw_base64": base64.b64encode(record.raw).decode()}
    place = record.place
    number = {"record": place.number} if place.number else {}
    found = {"file": place.file, "line": place.line, **number, "code": record.code, "reason": record.reason}
    return {**found, "length": record.length, **raw}


def _create(path: Path) -> io.TextIOWrapper:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write the quarantine file {path}: {error.strerror}.") from None


# -- from frames to records: the checks on a frame --------------------------------------------------------


class _Fault(Exception):
    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason


def _parsed(
    frames: Iterable[Frame], name: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    for frame in frames:
        place = Place(name, frame.line, frame.number)
        values: Mapping[str, Any] = {}
        try:
            values = _parse_json(_decode(frame, reading), frame, reading)
            _check_text(values, fields)
            _check_fields(values, fields)
        except _Fault as fault:
            yield BadRecord(place, fault.code, fault.reason, frame.raw, frame.length, tuple(values))
        else:
            yield Record(place, values)


def _rows(
    stream: BinaryIO, dialect: csv_shape.Dialect, name: str, fields: Mapping[str, Field], reading: Reading
) -> Iterator[Record | BadRecord]:
    header: csv_shape.Header | None = None
    empty = 0
    for frame, columns in frames.rows(stream, dialect.delimiter, reading.max_bytes):
        frame = replace(frame, line=frame.line + dialect.skipped)
        place = Place(name, frame.line)
        try:
            _decode(frame, reading)
            if columns is None:
                raise _cut(frame) or _Fault("quote", "a quote is not closed, or stands inside a field")
            cells = [column.decode() for column in columns]
            if header is None:
                header = _header(cells, fields, name, frame.line, reading)
                continue
            if not any(cells) and len(cells) > 1:
                empty += 1
                continue
            if (values := header.row(cells)) is None:
                reason = f"not as many columns as the header's {header.width} ({len(cells)})"
                raise _cut(frame) or _Fault("columns", reason)
            _check_fields(values, fields)
        except _Fault as fault:
            if header is None:
                then = opening.readings(frame.raw) if fault.code == "utf8" else ""
                refuse(
                    name, frame.line, "header", f"the first line must name the columns: {fault.reason}", then
                )
            yield BadRecord(place, fault.code, fault.reason, frame.raw, frame.length)
        else:
            yield Record(place, values)
    if empty:
        reading.tell(name, f"{empty:,} rows hold nothing but delimiters and are skipped")


def _header(
    cells: Sequence[str], fields: Mapping[str, Field], name: str, line: int, reading: Reading
) -> csv_shape.Header:
    header = csv_shape.Header(tuple(cells))
    named = [cell for cell in cells if cell.strip()]
    if len(set(named)) < len(named):
        raise _Fault("header", "two columns have the same name")
    for field, its in fields.items():
        if its.required and field not in named:
            refuse(
                name,
                line,
                "header",
                f"the first line must name the columns: none of its {len(cells)} columns is called {field!r}",
                f"They are: {shown(named)}. {reading.advise(named)}".strip(),
            )
    if header.unnamed:
        reading.tell(name, f"columns without a name are skipped ({header.unnamed})")
    return header


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tab and newlines
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[][{}]', re.DOTALL)  # or a string, to skip


def _cut(frame: Frame) -> _Fault | None:
    """The fault of an unreadable record, if the file ends inside it."""
    return None if frame.ended else _Fault("truncated", "the last line breaks off: it has no line end")


def _decode(frame: Frame, reading: Reading) -> str:
    if len(frame.body) > reading.max_bytes or frame.length > reading.max_bytes + 2:  # 2: a newline
        raise _Fault("long", f"longer than the limit of {reading.max_bytes:,} bytes ({frame.length:,})")
    try:
        text = frame.body.decode()
    except UnicodeDecodeError as error:
        half = _cut(frame) if error.reason == "unexpected end of data" else None
        raise half or _Fault("utf8", f"not UTF-8 (byte {error.start + 1} of the record)") from None
    if text.startswith("\ufeff"):
        raise _Fault("bom", "a byte order mark that is not at the start of the file")
    if found := _CONTROL.search(text):
        raise _Fault("control", f"a control character (U+{ord(found[0]):04X}, character {found.start() + 1})")
    return text


def _parse_json(text: str, frame: Frame, reading: Reading) -> dict[str, Any]:
    # Measure the depth first: the parser would recurse as deep as a stranger's file says.
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


def _check_text(values: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """JSON can spell characters that the file's bytes must not hold: "\\u0000", "\\ud800"."""
    for name, value in values.items():
        for text in (name, *_strings(value)):
            if found := _UNWANTED.search(text):
                where = f"field {name!r}" if name in fields else "another field"
                if found[0] < "\ud800":
                    raise _Fault("control", f"{where} holds a control character (U+{ord(found[0]):04X})")
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
        if field.nested or (field.number and type(value) is int):
            continue
        if not isinstance(value, str):
            raise _Fault("type", f"{name!r} is a {_json_type(value)}, not text")
        if not field.blank and not value.strip():
            raise _Fault("empty", f"{name!r} is blank")


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
