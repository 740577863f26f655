"""The delimiter and the header of a CSV file.

The delimiter is the one with which the header names the required columns; at most one does.
Excel adds empty columns and rows at the end, and a first line "sep=;"; pandas adds an index without a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from fedloom.data import frames
from fedloom.errors import ConfigError

KNOWN = {b",": "commas", b";": "semicolons", b"\t": "tabs", b"|": "bars"}
LONGEST = 1 << 20  # most bytes of a header


@dataclass(frozen=True)
class Dialect:
    delimiter: bytes
    skipped: int = 0  # lines before the header
    said: str = ""  # for the user, if the file's name suggests otherwise


def recognise(stream: BinaryIO, suffix: str, required: Sequence[str], delimiter: str | None) -> Dialect:
    usual = b"\t" if suffix == ".tsv" else b","
    first = stream.readline(LONGEST).rstrip(b"\r\n")
    skipped = 0
    declared = re.fullmatch(rb'"?sep=(.)"?[,;\t|]*', first, re.IGNORECASE)
    if declared:
        first, skipped = stream.readline(LONGEST).rstrip(b"\r\n"), 1
    while not first.strip() and (more := stream.readline(LONGEST)):
        first = more.rstrip(b"\r\n")
    if delimiter is not None:
        return Dialect(as_byte(delimiter), skipped)
    if (declared and 32 <= declared[1][0] < 127) or (declared and declared[1] == b"\t"):
        return Dialect(
            declared[1], skipped, f'read with columns separated by {_named(declared[1])}, as "sep=" says'
        )
    wanted = [name.encode() for name in required]
    made = {mark: frames.cells(first, mark) or [] for mark in (usual, *(m for m in KNOWN if m != usual))}
    fitting = [mark for mark, names in made.items() if all(name in names for name in wanted)]
    if not fitting and len(made[usual]) <= 1:  # refused anyway: then show the names it has
        fitting = [max(made, key=lambda mark: len(made[mark]))]
    taken = fitting[0] if fitting and usual not in fitting else usual
    return Dialect(
        taken, skipped, "" if taken == usual else f"read with columns separated by {_named(taken)}"
    )


@dataclass(frozen=True)
class Header:
    cells: tuple[str, ...]  # as in the file

    @property
    def width(self) -> int:
        """Columns up to the last one with a name."""
        return max((i + 1 for i, cell in enumerate(self.cells) if cell.strip()), default=0)

    @property
    def unnamed(self) -> int:
        return sum(not cell.strip() for cell in self.cells)

    def row(self, cells: Sequence[str]) -> Mapping[str, str] | None:
        """Name -> cell; None unless every name has a cell and all cells after the last name are blank."""
        if len(cells) < self.width or any(cell.strip() for cell in cells[self.width :]):
            return None
        return {name: cell for name, cell in zip(self.cells, cells, strict=False) if name.strip()}


def as_byte(delimiter: str) -> bytes:
    mark = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if (
        len(mark) != 1
        or not mark.isascii()
        or mark.isalnum()
        or mark in '"\r\n\\'
        or (ord(mark) < 32 and mark != "\t")
    ):
        raise ConfigError(
            f'Expected data.delimiter to be one character such as ";", "|" or "tab", got {delimiter!r}.'
        )
    return mark.encode()


def _named(mark: bytes) -> str:
    return KNOWN.get(mark, f"{mark.decode()!r}")
