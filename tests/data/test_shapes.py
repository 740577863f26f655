"""JSON and CSV as people save them: the shape is told from the content, and said."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import tomllib
import tracemalloc
from pathlib import Path

import pytest

from fedloom.data import sources
from fedloom.data.records import Field, Reading, read_records
from fedloom.errors import ConfigError, DataError

ROWS = [{"instruction": f'Add {i} {{[" and 2 é', "response": f"The sum, is {i}.\n"} for i in range(4)]
TEXTS = [(r["instruction"], r["response"]) for r in ROWS]
dump = json.dumps


def load(tmp_path: Path, name: str, content: str | bytes, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    examples, report = sources.load("table", str(path), **options)
    return [(e.instruction, e.response) for e in examples], report["notes"]


def refusal(tmp_path: Path, name: str, content: str | bytes, **options) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(tmp_path, name, content, **options)
    return str(caught.value)


JOINED = ",\n".join(map(dump, ROWS))
SHAPES = {
    "lines under .json": ("d.json", "\n".join(map(dump, ROWS)), "JSON lines"),
    "a list under .jsonl": ("d.jsonl", dump(ROWS), "a list of records"),
    "a list over lines under .jsonl": ("d.jsonl", f"[\n{JOINED}\n]", "a list of records"),
    "a list under a key": ("d.json", dump({"data": ROWS}), "the records under 'data'"),
    "a list under any key": ("d.json", dump({"v": 1, "rows": ROWS}, indent=2), "under 'rows'; not read: v"),
    "a list under a key, a record a line": ("d.jsonl", f'{{"data": [\n{JOINED}\n]}}', "under 'data'"),
    "a list that begins on the key's line": ("d.json", f'{{"data": [{JOINED}]}}', "under 'data'"),
    "records by id": ("d.json", dump(dict(enumerate(ROWS))), "an object of 4 records by id"),
    "records by id over lines": ("d.jsonl", dump(dict(enumerate(ROWS)), indent=1), "4 records by id"),
    "records by id under a key": ("d.json", dump({"v": 1, "all": dict(enumerate(ROWS))}), "under 'all'"),
    "pretty-printed": (
        "d.json",
        "\n".join(dump(r, indent=2) for r in ROWS),
        "objects that follow one another",
    ),
    "pretty-printed under .jsonl": (
        "d.jsonl",
        "\n\n".join(dump(r, indent=2) for r in ROWS),
        "follow one another",
    ),
    "several on a line": ("d.json", "".join(map(dump, ROWS)), "objects that follow one another"),
    "with commas and no list": ("d.json", JOINED, "objects that follow one another"),
}


@pytest.mark.parametrize(("name", "content", "said"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("pack", [None, lzma.compress, gzip.compress], ids=["plain", "xz", "gz"])
def test_a_shape_is_recognised_and_said(tmp_path, name, content, said, pack):
    if pack is not None:
        name, content = name + (".xz" if pack is lzma.compress else ".gz"), pack(content.encode())
    texts, notes = load(tmp_path, name, content)
    assert texts == TEXTS
    assert len(notes) == 1
    assert said in notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.jsonl", "\n".join(map(dump, ROWS))), ("d.json", dump(ROWS)), ("d.jsonl", dump(ROWS[0]))],
)
def test_nothing_is_said_of_a_file_that_is_what_its_name_says(tmp_path, name, content):
    assert load(tmp_path, name, content)[1] == []


def test_records_on_one_line_are_told_apart_by_number(tmp_path):
    text = refusal(tmp_path, "d.json", dump([ROWS[0], 7, ROWS[1], None]))
    assert "d.json:1 (record 2)  object" in text
    assert "d.json:1 (record 4)  object: a JSON null" in text


def test_one_cause_is_one_line_however_many_records_it_costs(tmp_path):
    text = refusal(tmp_path, "d.json", dump({"data": [{"instruction": "a"}] * 400}))
    assert "no field 'response' (400 records, this is the first)" in text
    assert len(text.splitlines()) <= 6


@pytest.mark.parametrize("wanted", ["train", "test"])
def test_several_lists_are_ambiguous_until_the_key_is_named(tmp_path, wanted):
    content = dump({"train": ROWS, "test": ROWS[:1]})
    text = refusal(tmp_path, "d.json", content)
    assert "'train' (a list of 4), 'test' (a list of 1)" in text
    assert 'data.field = "train"' in text
    assert len(load(tmp_path, "d.json", content, field=wanted)[0]) == {"train": 4, "test": 1}[wanted]
    assert "its keys are train, test" in refusal(tmp_path, "d.json", content, field="dev")


@pytest.mark.parametrize("content", [dump(ROWS), "\n".join(map(dump, ROWS))])
def test_a_key_is_refused_where_there_is_none_to_look_under(tmp_path, content):
    assert "leave the setting out" in refusal(tmp_path, "d.json", content, field="data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.json",
            dump({"instruction": {"0": "a"}, "response": {"0": "b"}}),
            "expected records, got columns",
        ),
        ("d.json", dump({"instruction": ["a"], "response": ["b"]}), "expected records, got columns"),
        ("d.json", dump({"columns": ["a"], "index": [0], "data": [["x"]]}), 'orient="records"'),
        ("d.json", "// mine\n" + dump(ROWS), "d.json:1: a comment"),
        ("d.json", '{\n // x\n "data": [\n' + dump(ROWS[0]) + "\n]}", "d.json:3: not JSON.*comments"),
        (
            "d.json",
            "\n".join(["{'instruction': 'a', 'response': 'b'}"] * 300),
            "d.json:1: not JSON: Expecting property",
        ),
        ("d.json", dump({"data": []}), "empty-file"),
        ("d.csv", b"PK\x03\x04....", "Excel workbook"),
        ("d.csv", "<!DOCTYPE html>\n<html>", "an HTML page"),
        ("d.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("d.csv", gzip.compress(b"instruction,response\na,b\n", mtime=0), "compressed by gzip"),
        ("d.json", b"PAR1....", "a Parquet file"),
        ("d.csv", "instruction,response\na,b\n".encode("utf-16-le"), 'data.encoding = "utf-16-le"'),
    ],
)
def test_what_cannot_be_read_is_named_for_what_it_is(tmp_path, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        load(tmp_path, name, content, on_bad="skip")
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_record_under_a_key_costs_itself_alone(tmp_path):
    content = '{\n"data": [\n{"instruction": "a" "response": "b"},\n' + JOINED + "\n]}"
    texts, notes = load(tmp_path, "d.json", content, on_bad="skip")
    assert texts == TEXTS
    assert notes[1].startswith("1 of 5 records are left out: not JSON")


def test_a_large_object_is_read_with_the_memory_of_a_record(tmp_path):
    path = tmp_path / "d.json"
    with path.open("w") as file:
        file.write(
            '{"info": {}, "data": [' + ", ".join([dump(ROWS[0])] * 40_000) + "]}"
        )  # 2.7 MB on one line
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, {"instruction": Field()}, Reading(max_bytes=10_000))) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # bytes


# -- CSV --------------------------------------------------------------------------------------------------

PLAIN = [("a, b", "c;d")]
TABLES = {
    "semicolons": ("d.csv", 'instruction;response\r\na, b;"c;d"\r\n', "separated by semicolons"),
    "tabs": ("d.csv", "instruction\tresponse\na, b\tc;d\n", "separated by tabs"),
    "bars": ("d.csv", "instruction|response\na, b|c;d\n", "separated by bars"),
    "semicolons under .tsv": ("d.tsv", 'instruction;response\na, b;"c;d"\n', "separated by semicolons"),
    "sep=": ("d.csv", 'sep=;\r\n"instruction";"response"\r\na, b;"c;d"\r\n', '"sep=" says'),
    "a byte order mark and a quoted header": (
        "d.csv",
        '\ufeff"instruction";"response"\r\n"a, b";"c;d"',
        "semicolons",
    ),
    "empty columns at the end": ("d.csv", 'instruction,response,,\n"a, b",c;d,,\n', "columns without a name"),
    "an index of pandas": ("d.csv", ',instruction,response\n0,"a, b",c;d\n', "columns without a name"),
    "empty rows at the end": ("d.csv", 'instruction,response\n"a, b",c;d\n,\n,\n', "2 rows hold nothing"),
    "old Macs": ("d.csv", 'instruction,response\r"a, b",c;d\r', "old Macs"),
    "UTF-16": (
        "d.csv",
        'instruction,response\r\n"a, b",c;d\r\n'.encode("utf-16"),
        "utf-16, as its byte order mark says",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), TABLES.values(), ids=TABLES.keys())
def test_a_table_of_a_spreadsheet_is_recognised_and_said(tmp_path, name, content, said):
    texts, notes = load(tmp_path, name, content)
    assert texts == PLAIN
    assert len(notes) == 1
    assert said in notes[0]


def test_text_in_a_column_without_a_name_is_never_dropped(tmp_path):
    text = refusal(tmp_path, "d.csv", "instruction,response,,\nAdd 3, and 2,Five,\n")
    assert "d.csv:2  columns: not as many columns as the header's 2 (4)" in text


def test_another_encoding_is_named_and_never_guessed(tmp_path):
    content = "instruction;response\nÖl?;Größe\nÜber?;Straße\n".encode("cp1252")
    text = refusal(tmp_path, "d.csv", content)
    assert "not UTF-8 (2 records, this is the first)" in text
    assert 'data.encoding = "cp1252"' in text
    assert load(tmp_path, "d.csv", content, encoding="cp1252")[0] == [("Öl?", "Größe"), ("Über?", "Straße")]
    assert 'data.encoding = "cp1252"' in refusal(tmp_path, "d.csv", "frågor;svar\na;b\n".encode("cp1252"))


def test_utf8_is_never_read_as_anything_else(tmp_path):
    content = b"instruction,response\n" + "é,ß\n".encode() * 5 + b"caf\xe9,x\n"
    texts, notes = load(tmp_path, "d.csv", content, on_bad="skip")
    assert texts == [("é", "ß")] * 5
    assert notes[0].startswith("1 of 6 records are left out: not UTF-8 (1).")


def test_an_encoding_that_does_not_fit_is_refused_whole(tmp_path):
    text = refusal(
        tmp_path, "d.csv", b"instruction,response\na,b\nc,\x81\n", encoding="cp1252", on_bad="skip"
    )
    assert "not cp1252 after line 1" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": "ab"}, "one character"),
        ({"delimiter": '"'}, "one character"),
        ({"encoding": "klingon"}, "not an encoding"),
        ({"encoding": "base64"}, "not an encoding"),
    ],
)
def test_delimiters_and_encodings_that_are_none_are_refused(tmp_path, options, message):
    assert message in refusal(tmp_path, "d.csv", "instruction,response\na,b\n", **options)


@pytest.mark.parametrize(("delimiter", "mark"), [(":", ":"), ("tab", "\t"), ("\\t", "\t")])
def test_a_delimiter_may_be_named(tmp_path, delimiter, mark):
    assert load(tmp_path, "d.csv", f"instruction{mark}response\na,b{mark}c\n", delimiter=delimiter)[0] == [
        ("a,b", "c")
    ]


# -- columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "proposal"),
    [
        (["prompt", "completion"], '{ instruction = "prompt", response = "completion" }'),
        (["Question", "Answer", "id"], '{ instruction = "Question", response = "Answer" }'),
        (
            ["instruction", "input", "output"],
            '{ instruction = "instruction", response = "output", context = "input" }',
        ),
        (["input", "target"], '{ instruction = "input", response = "target" }'),
        (["user_query", "bot_response"], '{ instruction = "user_query", response = "bot_response" }'),
        (["topic", "instrution", "respons"], 'instruction = "instrution", response = "respons"'),
    ],
)
@pytest.mark.parametrize("as_csv", [False, True], ids=["json", "csv"])
def test_a_refusal_lists_what_is_there_and_the_nearest_mapping(tmp_path, found, proposal, as_csv):
    content = (
        ",".join(found) + "\n" + ",".join("x" * len(found)) if as_csv else dump([dict.fromkeys(found, "x")])
    )
    text = refusal(tmp_path, "d.csv" if as_csv else "d.json", content)
    assert ", ".join(found) in text
    assert proposal in text
    [setting] = re.findall(r"data\.columns = \{[^}]*\}", text)
    mapping = tomllib.loads(setting)["data"]["columns"]
    assert (
        len(load(tmp_path, "d.csv" if as_csv else "d.json", content, columns=mapping)[0]) == 1
    )  # ready to paste


def test_a_header_that_is_a_text_is_not_quoted(tmp_path):
    assert "SECRET" not in refusal(tmp_path, "d.csv", "Which SECRET is this one here?,x\na,b\n")


def test_columns_that_are_not_used_are_told_once(tmp_path):
    rows = [{**row, "choices": ["a", "b"], "n": i} for i, row in enumerate(ROWS)]
    assert load(tmp_path, "d.jsonl", "\n".join(map(dump, rows)))[1] == [
        "columns that are not used: choices, n"
    ]


def test_what_is_skipped_is_said_with_its_cause(tmp_path):
    lines = [dump(ROWS[0])] * 10 + [dump({"question": "SECRET", "response": "b"})] * 30
    texts, [note] = load(tmp_path, "d.jsonl", "\n".join(lines), on_bad="skip")
    assert len(texts) == 10
    assert note.startswith("30 of 40 records are left out: no field 'instruction' (30).")
    assert "Fields of the records that lack one: question, response. Perhaps: data.columns = {" in note
    assert "SECRET" not in note
