"""Where examples come from: one function for each kind of data, all through the strict reader.

This file says what a record must hold. Instruction and response must never be blank: there is nothing to
learn without them. A blank context is normal and accepted. A category or an owner must not be blank if it is
asked for, since splits use it. The published Dolly and MedQuAD files meet all of this; they contain
zero-width and replacement characters, which are kept, and Dolly repeats a few records, which are kept and
counted.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedloom.data import chat as conversations
from fedloom.data import columns as names
from fedloom.data import parquet, records
from fedloom.data.example import Example
from fedloom.data.records import FORMATS, BadRecord, Field, Loaded, Place, Reading, Record
from fedloom.errors import ConfigError, DataError

Paths = str | Path | Sequence[str | Path]

# The demands on each of our columns in a file where it is asked for.
DEMANDS = {
    "instruction": Field(),
    "response": Field(),
    "context": Field(blank=True),
    "category": Field(number=True),
    "owner": Field(number=True),
}

# Of the data sets that sources are named after, as published; the other sources are shapes that any data may
# have.
LICENCES = {
    "microworld": "Apache-2.0",
    "dolly": "CC-BY-SA-3.0",
    "medquad": "CC-BY-4.0",
    "alpacare": "CC-BY-NC-4.0",
}
LENIENT = Field(required=False, blank=True)
PARQUET = ".parquet"
FIXED = ("dolly", "alpaca", "alpacare", "medquad")  # sources that know their columns
MAPPED = ("table", "hub")  # sources that take data.columns

NO_INPUT = ("<noinput>", "NA")  # in AlpaCare's files: the task has no input


def dolly(
    path: Paths, reading: Reading = Reading(), *, columns: Mapping[str, str] = MappingProxyType({})
) -> Loaded[Example]:
    """databricks-dolly-15k: instruction, context, response, and one of eight categories.

    Here and below, `columns` gives the names of columns where a file differs from the published one.
    """
    fixed = {ours: ours for ours in ("instruction", "context", "response", "category")}
    return _read(path, {**fixed, **columns}, _demands({**fixed, **columns}), reading)


def alpaca(
    path: Paths, reading: Reading = Reading(), *, columns: Mapping[str, str] = MappingProxyType({})
) -> Loaded[Example]:
    """Alpaca's shape, a JSON list or JSON lines: instruction, output, and an input that may be absent.

    Alpaca has no categories. Copies of it that contain blank outputs need on_bad = "skip".
    """
    columns = {"instruction": "instruction", "context": "input", "response": "output", **columns}
    return _read(path, columns, {**_demands(columns), columns["context"]: LENIENT}, reading)


def alpacare(
    path: Paths, reading: Reading = Reading(), *, columns: Mapping[str, str] = MappingProxyType({})
) -> Loaded[Example]:
    """AlpaCare's medical tasks in Alpaca's shape: MedInstruct-52k, or its clinicians' seeds once answered.

    As in AlpaCare's own code, an input of "<noinput>" or "NA" counts as no input. The topic, which the seeds
    have and MedInstruct-52k lacks, is the category. The published seeds hold no responses and are refused.
    """
    columns = {
        "instruction": "instruction",
        "context": "input",
        "response": "output",
        "category": "topic",
        **columns,
    }
    demands = {**_demands(columns), columns["context"]: LENIENT, columns["category"]: LENIENT}

    def make(record: Record) -> Example:
        example = _example(record, columns)
        return replace(example, context="") if example.context.strip() in NO_INPUT else example

    # Check for the response last: a file in which no record has one gets its own error.
    response = columns["response"]
    found = _records(path, {**demands, response: LENIENT}, reading)
    return records.load(_answered(found, demands, response), make, reading)


def _answered(
    found: Iterable[Record | BadRecord], demands: Mapping[str, Field], response: str
) -> Iterator[Record | BadRecord]:
    """Checks records against `demands`, and refuses them all if none has a response."""
    answered = unanswered = 0
    fields: dict[str, None] = {}
    for record in found:
        if isinstance(record, BadRecord):
            yield record
            continue
        if str(record.values.get(response) or "").strip():
            answered += 1
        else:
            unanswered += 1
            fields |= dict.fromkeys(record.values)
        yield records.check_row(record.place, record.values, demands)
    if unanswered and not answered and (several := names.answers(list(fields))):
        raise DataError(
            f"None of the {unanswered:,} records has a response (field {response!r}). They have the answers of models "
            f"instead, as MedInstruct-test has: {', '.join(several)}. Choose one of them: as a test set, "
            f'data.test_columns = {{ response = "{several[0]}" }}; to train on, data.source = "table", '
            f'data.columns = {{ context = "input", response = "{several[0]}" }}.'
        )
    if unanswered and not answered:
        raise DataError(
            f"None of the {unanswered:,} records has a response (field {response!r}). AlpaCare's 167 seed "
            "tasks, med_seed.json, are published as instructions without responses, so no model can be trained "
            "on them. Use MedInstruct-52k, the tasks generated from them, or answer the seeds: give each an "
            "'output'. If the file has its responses under another name, read it as a table: "
            'data.source = "table", data.columns = { response = ... }.'
        )


def medquad(
    path: Paths, reading: Reading = Reading(), *, columns: Mapping[str, str] = MappingProxyType({})
) -> Loaded[Example]:
    """MedQuAD: questions and answers of nine institutions, the owners; the question type is the category."""
    columns = {
        "instruction": "question",
        "response": "answer",
        "owner": "source",
        "category": "qtype",
        **columns,
    }
    return _read(path, columns, _demands(columns), reading)


def table(
    path: Paths, columns: Mapping[str, str] | None = None, reading: Reading = Reading()
) -> Loaded[Example]:
    """Any JSONL, JSON, CSV, TSV or Parquet: a file, a folder, a pattern such as "data/*.csv", or several.

    `columns` maps ours (instruction, response, context, category, owner) to those of the files. Every record
    must have the columns that it names. Of the others, instruction and response are required under our
    name; the rest are optional.
    """
    columns, demands = _mapped(columns)
    return _read(path, columns, demands, reading)


def chat(path: Paths, reading: Reading = Reading()) -> Loaded[Example]:
    """Conversations, OpenAI's `messages` or ShareGPT's `conversations`: one example each, see chat.py."""
    return records.load(
        map(conversations.checked, _records(path, conversations.DEMANDS, reading)),
        conversations.example,
        reading,
    )


def hub(
    name: str,
    columns: Mapping[str, str] | None = None,
    reading: Reading = Reading(),
    *,
    split: str = "train",
    revision: str | None = None,
    allow_download: bool = False,
) -> Loaded[Example]:
    """A data set on the Hugging Face Hub, "owner/name" or "owner/name:subset", or a local folder of Parquet.

    Columns as for `table`. Uses the local cache alone unless `allow_download`. Places count rows from 1.
    Needs the extra "data".
    """
    columns, demands = _mapped(columns)
    rows = _load_dataset(name, split, revision, allow_download)
    parquet.check_columns(repr(name), rows.column_names, demands, reading)
    short = Path(name).name if Path(name).is_dir() else name
    checked = (records.check_row(Place(short, n), row, demands) for n, row in enumerate(rows, 1))
    return records.load(_unused(checked, demands, reading), lambda record: _example(record, columns), reading)


SOURCES: dict[str, Callable[..., Loaded[Example]]] = {
    "dolly": dolly,
    "alpaca": alpaca,
    "alpacare": alpacare,
    "medquad": medquad,
    "chat": chat,
    "table": table,
    "hub": hub,
}


def load(
    source: str,
    path: Paths | None,
    *,
    columns: Mapping[str, str] | None = None,
    test_columns: Mapping[str, str] | None = None,
    split: str = "train",
    revision: str | None = None,
    on_bad: Any = "fail",
    owner: str | None = None,
    field: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    quarantine: Path | None = None,
    allow_download: bool = False,
) -> tuple[list[Example], dict[str, Any]]:
    """Examples of a source by name, and the reader's report: records, bad by code, duplicates, notes.

    If `test_columns` is not None, this is a test set, and they give the names that differ in it. With `owner`
    = "file" an example's owner is its file. Notes are sentences for the user.
    """
    if not path:
        what = "the data set's id" if source == "hub" else "the file to read"
        raise ConfigError(f'data.source = "{source}" needs data.path, {what}.')
    if columns and source in FIXED:
        raise ConfigError(
            f'data.source = "{source}" has fixed columns; use "table" to name columns, or drop data.columns.'
        )
    if test_columns and source not in (*FIXED, *MAPPED):
        raise ConfigError(
            f'data.source = "{source}" reads a test set like the rest of the data; drop data.test_columns.'
        )
    told: dict[str, list[str]] = {}  # what was not as expected -> the files
    key = "data.columns" if test_columns is None else "data.test_columns"
    reading = Reading(
        on_bad=on_bad,
        quarantine=quarantine,
        field=field,
        delimiter=delimiter,
        encoding=encoding,
        tell=lambda file, what: told.setdefault(what, []).append(file),
        advise=lambda found: names.advice(found, source=source, known=list(SOURCES), key=key),
    )
    renamed = {**(columns or {}), **(test_columns or {})}
    if source == "hub":
        if not isinstance(path, str):
            raise ConfigError('data.source = "hub" takes one data set id as data.path.')
        options = {"split": split, "revision": revision, "allow_download": allow_download}
        loaded = hub(path, renamed, reading, **options)  # type: ignore[arg-type]
    elif source == "table":
        loaded = table(path, renamed, reading)
    elif renamed:
        loaded = SOURCES[source](path, reading, columns=renamed)
    else:
        loaded = SOURCES[source](path, reading)
    examples = list(loaded)
    if owner == "file":
        examples = _by_file(examples, loaded.places)
    notes = [f"{records.shown(files)}: {what}" if any(files) else what for what, files in told.items()]
    report = {
        "records": len(loaded),
        "bad": dict(loaded.bad),
        "duplicates": loaded.duplicates,
        "notes": notes,
    }
    return examples, report


def _by_file(examples: Sequence[Example], places: Sequence[Place]) -> list[Example]:
    """Each example with its file's name, without the endings, as owner; folders only where they differ."""
    plain = {
        p.file: p.file.removesuffix(Path(p.file).name) + Path(p.file).name.partition(".")[0] for p in places
    }
    # If two files differ in their endings alone, the endings stay.
    unique = plain if len(set(plain.values())) == len(plain) else {file: file for file in plain}
    return [replace(e, owner=unique[p.file]) for e, p in zip(examples, places, strict=True)]


def _mapped(columns: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, Field]]:
    """All columns, ours -> theirs, and the demands on theirs."""
    asked = dict(columns or {})
    if unknown := sorted(asked.keys() - DEMANDS.keys()):
        raise ConfigError(f"Unknown column {unknown[0]!r}; ours are {', '.join(DEMANDS)}.")
    asked = {"instruction": "instruction", "response": "response", **asked}
    optional = {ours: ours for ours in DEMANDS if ours not in asked and ours not in asked.values()}
    lenient = {
        theirs: Field(required=False, blank=True, number=DEMANDS[theirs].number) for theirs in optional
    }
    return {**asked, **optional}, {**_demands(asked), **lenient}


def _demands(columns: Mapping[str, str]) -> dict[str, Field]:
    """If two of ours read the same column, the stricter demand counts."""
    demands: dict[str, Field] = {}
    for ours, theirs in columns.items():
        new, old = DEMANDS[ours], demands.get(theirs, DEMANDS[ours])
        demands[theirs] = Field(blank=new.blank and old.blank, number=new.number and old.number)
    return demands


def _read(
    path: Paths, columns: Mapping[str, str], demands: Mapping[str, Field], reading: Reading
) -> Loaded[Example]:
    return records.load(_records(path, demands, reading), lambda record: _example(record, columns), reading)


def _records(path: Paths, demands: Mapping[str, Field], reading: Reading) -> Iterator[Record | BadRecord]:
    files = _files(path, reading)
    together = os.path.commonpath([file.parent for file in files])

    def one(file: Path) -> Iterator[Record | BadRecord]:
        # Short, and independent of where the data lies: it becomes part of example ids.
        name = Path(os.path.relpath(file, together)).as_posix()
        read = parquet.read if file.suffix.lower() == PARQUET else records.read_records
        return read(file, demands, reading, name=name)

    return _unused(chain.from_iterable(map(one, files)), demands, reading)


def _unused(
    found: Iterable[Record | BadRecord], used: Collection[str], reading: Reading
) -> Iterator[Record | BadRecord]:
    """The records unchanged; reports at the end which fields are not used."""
    fields: Counter[str] = Counter()
    good = 0
    for record in found:
        if isinstance(record, Record):
            good += 1
            fields.update(name for name in record.values if name not in used)
        yield record
    if fields:
        often = min(fields.values()) < good
        which = [f"{name} (in {count:,})" if often else name for name, count in fields.most_common()]
        reading.tell("", f"columns that are not used: {records.shown(which)}")


def _files(path: Paths, reading: Reading) -> list[Path]:
    """The absolute path of every file meant; from a folder, the readable files in alphabetical order."""
    given = [path] if isinstance(path, str | Path) else list(path)
    files: list[Path] = []
    for item in given:
        place = Path(item).expanduser().absolute()
        if place.is_dir():
            files += _of_folder(place, str(item), reading)
        elif not place.exists() and (matches := sorted(glob.glob(str(place), recursive=True))):
            files += [Path(match) for match in matches if not Path(match).is_dir()]
        else:
            files.append(place)
    if not files:
        raise ConfigError("Expected at least one file to read, got none.")
    if len(set(files)) < len(files):
        raise ConfigError("A file is named twice in data.path; its records would count double.")
    return files


def _of_folder(folder: Path, item: str, reading: Reading) -> list[Path]:
    there = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    inside = [file for file in there if file.is_file() and _readable(file)]
    if not inside:
        raise DataError(f"{item}: no {', '.join((*FORMATS, PARQUET))} file in this folder (empty-folder).")
    if others := [f.name + "/" * f.is_dir() for f in there if f not in inside]:
        reading.tell("", f"not read in that folder: {records.shown(others)}")
    return inside


def _readable(file: Path) -> bool:
    return records.plain_suffix(file) in FORMATS or file.suffix.lower() == PARQUET


def _example(record: Record, columns: Mapping[str, str]) -> Example:
    def text(ours: str) -> str:
        value = record.values.get(columns[ours]) if ours in columns else None
        return "" if value is None else str(value)

    return Example(
        instruction=text("instruction"),
        response=text("response"),
        context=text("context"),
        category=text("category"),
        owner=text("owner"),
        id=str(record.place),
    )


def _load_dataset(name: str, split: str, revision: str | None, allow_download: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            'data.source = "hub" needs the package datasets: pip install "fedloom[data]".'
        ) from None
    local = Path(name).is_dir()
    dataset, _, subset = (name, "", "") if local else name.partition(":")
    was_offline = datasets.config.HF_HUB_OFFLINE
    # The library reads this at every call. It also stops the library from reporting use of a local folder.
    datasets.config.HF_HUB_OFFLINE = was_offline or local or not allow_download
    try:
        return datasets.load_dataset(dataset, subset or None, split=split, revision=revision)
    except Exception as error:  # the library, its file formats and the network raise dozens of types
        offline = datasets.config.HF_HUB_OFFLINE and not local
        hint = "Nothing is downloaded unless model.allow_download = true and HF_HUB_OFFLINE is not set. "
        raise ConfigError(
            f"The data set {name!r} (split {split!r}) could not be loaded. {hint if offline else ''}"
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
