"""Parquet files by path, in batches: rows must meet the same demands as records of a text file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedloom.data.records import BadRecord, Field, Place, Reading, Record, check_row, shown
from fedloom.errors import ConfigError, DataError

BATCH = 1024  # rows in memory


def read(
    path: Path, fields: Mapping[str, Field], reading: Reading, *, name: str
) -> Iterator[Record | BadRecord]:
    """Every row, good or bad; a place's line is the row's number, from 1. Needs the extra "data"."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(
            f'{path}: Parquet needs the package pyarrow: pip install "fedloom[data]".'
        ) from None
    count = 0
    try:
        with ParquetFile(path) as file:
            check_columns(name, file.schema_arrow.names, fields, reading)
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    count += 1
                    yield check_row(Place(name, count), row, fields)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (absent).") from None
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        what = str(error).partition("\n")[0][:200]
        raise DataError(
            f"{path}: not a Parquet file, or a damaged one (format): {type(error).__name__}: {what}"
        ) from None
    if not count:
        raise DataError(f"{path}: holds no record (empty-file).")


def check_columns(name: str, found: Sequence[str], fields: Mapping[str, Field], reading: Reading) -> None:
    """Raises DataError if a required column is missing."""
    for field, its in fields.items():
        if its.required and field not in found:
            advice = reading.advise(found)
            raise DataError(
                f"{name} has no column {field!r} (header). They are: {shown(found)}. {advice}".strip()
            )
