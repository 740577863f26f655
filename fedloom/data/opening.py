"""Open a foreign text file as a stream of UTF-8 with \\n line ends, and refuse early what is not text.

UTF-8 passes byte by byte, valid or not: the reader names the damaged records. Another encoding comes from a
byte order mark or from the user and is never guessed: cp1252, cp1250 and cp1251 differ only in the letters
they give, and only someone who reads the language can tell which are right.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedloom.errors import ConfigError, DataError

ARCHIVES: dict[str, Callable[[Any], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
BOM = codecs.BOM_UTF8
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 1 << 14  # bytes examined

OTHERS = {
    b"PK\x03\x04": "a zip archive (an Excel workbook, .xlsx, is one); save the sheet as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save the sheet as CSV",
    b"\x1f\x8b": "compressed by gzip; its name should end in .gz after the format's own ending",
    b"\xfd7zXZ\x00": "compressed by xz; its name should end in .xz after the format's own ending",
    b"BZh": "compressed by bzip2; its name should end in .bz2 after the format's own ending",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PAR1": "a Parquet file; its name should end in .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet or JSON lines",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF",
    b"{\\rtf": "a rich-text document; save it as plain text",
    b"\x80\x04\x95": "a Python pickle, which is never read; save it as JSON lines",
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the data; fetch the file itself: git lfs pull",
    b"<!doctype": "an HTML page; perhaps the page about the file was saved in its place",
    b"<html": "an HTML page; perhaps the page about the file was saved in its place",
    b"<?xml": "an XML document; convert it to JSON lines or CSV",
}


@contextmanager
def opened(
    path: Path, encoding: str | None, tell: Callable[[str], None] = lambda _: None
) -> Iterator[BinaryIO]:
    """The file's content, unpacked, as UTF-8 without a byte order mark. Surprises are reported to `tell`."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if path.suffix.lower() in ARCHIVES:
            file = stack.enter_context(ARCHIVES[path.suffix.lower()](file))
        stream = stack.enter_context(io.BufferedReader(file, 1 << 16))
        head = stream.peek(HEAD)
        marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
        if marked is None:
            _refuse_others(path, head, encoding)
        taken = marked or encoding
        if taken is not None and codecs.lookup(taken).name not in ("utf-8", "utf-8-sig", "ascii"):
            tell(f"read as {taken}" + (", as its byte order mark says" if marked else ""))
            stream = stack.enter_context(_piped(stream, _decoding(path, taken)))
            head = stream.peek(HEAD)
        if b"\r" in head and b"\n" not in head:
            tell("read with the line ends of old Macs (\\r)")
            stream = stack.enter_context(_piped(stream, lambda piece, _: piece.replace(b"\r", b"\n")))
        if stream.peek(3).startswith(BOM):
            stream.read(3)
        yield stream


def check_encoding(name: str) -> None:
    """Raises ConfigError if Python knows no text encoding of this name."""
    try:
        "a".encode(name).decode(name)
    except (LookupError, UnicodeError):
        raise ConfigError(
            f'data.encoding = "{name}" is not an encoding that Python knows; expected one such as "cp1252".'
        ) from None


def readings(damaged: bytes) -> str:
    """The bytes beyond ASCII as letters in common encodings, for a person to choose from."""
    high = sorted(set(damaged) - set(range(128)))
    shown = []
    for name in ("cp1252", "cp1250", "cp1251", "mac-roman"):
        letters = bytes(high).decode(name, "ignore")
        shown.append(f'"{name}" {" ".join(letters[:8])}')
    return (
        'If the whole file is in another encoding, name it, such as data.encoding = "cp1252", which Excel on '
        f"Windows saves in Western Europe. The letters beyond ASCII would be, in {'; '.join(shown)}."
    )


def _refuse_others(path: Path, head: bytes, encoding: str | None) -> None:
    start = head.removeprefix(BOM).lstrip()[:64].lower()
    for signature, what in OTHERS.items():
        if head.startswith(signature) or start.startswith(
            signature.lower() if signature.startswith((b"<", b"version")) else b"\0\0"
        ):
            raise DataError(f"{path}: this is {what} (format).")
    wide = head[: len(head) // 2 * 2]
    if encoding is None and len(wide) >= 4:
        for at, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            if wide[at::2].count(0) > 0.7 * len(wide[at::2]) and not wide[1 - at :: 2].count(0):
                raise DataError(
                    f'{path}: this looks like UTF-16 without a byte order mark; say so: data.encoding = "{name}" (format).'
                )


def _decoding(path: Path, encoding: str) -> Callable[[bytes, bool], bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = 1

    def change(piece: bytes, final: bool) -> bytes:
        nonlocal lines
        try:
            text = decoder.decode(piece, final)
            lines += text.count("\n")
            return text.encode()
        except UnicodeError as error:
            raise DataError(
                f"{path}: not {encoding} after line {lines}: {getattr(error, 'reason', error)} (encoding)."
            ) from None

    return change


def _piped(stream: BinaryIO, change: Callable[[bytes, bool], bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Piped(stream, change), 1 << 16)


class _Piped(io.RawIOBase):
    def __init__(self, stream: BinaryIO, change: Callable[[bytes, bool], bytes]):
        self._stream = stream
        self._change = change
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._stream.read(1 << 16)
            self._ready = self._change(piece, not piece)
            if not piece and not self._ready:
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
