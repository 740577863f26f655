"""Every bad record is named at its place; no good one is lost."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedloom.data.records import BadRecord, Field, Place, Reading, Record, check_row, load, read_records
from fedloom.errors import ConfigError, DataError

FIELDS = {"instruction": Field(), "response": Field(), "context": Field(required=False, blank=True)}
GOOD = {"instruction": "Name a tree.", "response": "Oak"}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
LIMITS = Reading(max_bytes=2000, max_depth=10)


def read(tmp_path: Path, content: bytes, name: str = "data.jsonl", reading: Reading = LIMITS, fields=FIELDS):
    """Good records as a list of values, bad ones as (line, code)."""
    path = tmp_path / name
    path.write_bytes(content)
    records = list(read_records(path, fields, reading, name=name))
    good = [dict(r.values) for r in records if isinstance(r, Record)]
    return good, [(r.place.line, r.code) for r in records if isinstance(r, BadRecord)]


# -- one line of JSON -------------------------------------------------------------------------------------

# (code, the damaged line): none may hold a line end, so that the place of each is known
DAMAGED: list[tuple[str, bytes]] = [
    ("utf8", b'{"instruction": "caf\xe9", "response": "x"}'),
    ("utf8", b'{"instruction": "\xed\xa0\x80", "response": "x"}'),  # a surrogate, encoded
    ("utf8", b"\xff\xfe{\x00}\x00"),
    ("bom", b'\xef\xbb\xbf{"instruction": "a", "response": "x"}'),
    ("control", b'{"instruction": "a\x00b", "response": "x"}'),
    ("control", b'{"instruction": "a\x1bb", "response": "x"}'),
    ("control", b'{"instruction": "a\\u0000b", "response": "x"}'),
    ("control", b'{"instruction": "a", "response": "x", "other": ["\\u0007"]}'),
    ("control", b'{"instruction": "1\\frac{2}", "response": "x"}'),  # \f: LaTeX that was not escaped
    ("surrogate", b'{"instruction": "\\ud800", "response": "x"}'),
    ("surrogate", b'{"instruction": "a", "response": "\\udc00\\ud83d"}'),
    ("json", b'{"instruction": "a", "response": "x"'),
    ("json", b'{"instruction": "a", "response": "x"}}'),
    ("json", b'{"instruction": "a, "response": "x"}'),
    ("json", b"{'instruction': 'a', 'response': 'x'}"),
    ("json", b'{"instruction": "a", "response": "x",}'),
    ("json", b'{"instruction": "a", "response": "x"} {"instruction": "b", "response": "y"}'),
    ("json", b'{"instruction": "a\tb", "response": "x"}'),
    ("json", b'{"instruction": "a\\qb", "response": "x"}'),
    ("json", b"undefined"),
    ("object", b'["instruction", "response"]'),
    ("object", b'"instruction"'),
    ("object", b"42"),
    ("object", b"null"),
    ("duplicate", b'{"instruction": "a", "response": "x", "response": "y"}'),
    ("duplicate", b'{"instruction": "a", "response": "x", "m": {"k": 1, "k": 1}}'),
    ("number", b'{"instruction": "a", "response": "x", "score": NaN}'),
    ("number", b'{"instruction": "a", "response": "x", "score": -Infinity}'),
    ("number", b'{"instruction": "a", "response": "x", "score": 1e999}'),
    ("deep", b'{"instruction": "a", "response": "x", "m": ' + b"[" * 10 + b"]" * 10 + b"}"),
    ("deep", b"[" * 1900),
    ("long", b'{"instruction": "a", "response": "' + b"x" * 2000 + b'"}'),
    ("long", b"\x00" * 200_000),
    ("missing", b'{"instruction": "a"}'),
    ("missing", b"{}"),
    ("null", b'{"instruction": "a", "response": null}'),
    ("type", b'{"instruction": "a", "response": 3}'),
    ("type", b'{"instruction": "a", "response": true}'),
    ("type", b'{"instruction": ["a"], "response": "x"}'),
    ("type", b'{"instruction": "a", "response": "x", "context": {}}'),
    ("empty", b'{"instruction": "a", "response": ""}'),
    ("empty", b'{"instruction": " \\n\\t\\u00a0", "response": "x"}'),
]


@pytest.mark.parametrize(("code", "line"), DAMAGED, ids=lambda v: v if isinstance(v, str) else repr(v[:40]))
def test_a_damaged_line_is_named_and_its_neighbours_are_kept(tmp_path, code, line):
    good, bad = read(tmp_path, GOOD_LINE + line + b"\n" + GOOD_LINE)
    assert bad == [(2, code)]
    assert good == [GOOD, GOOD]


@pytest.mark.parametrize(
    "line",
    [
        GOOD_LINE,
        GOOD_LINE[:-1],  # the last line may lack its end, if it is whole
        GOOD_LINE[:-1] + b"\r\n",
        b"\xef\xbb\xbf" + GOOD_LINE,
        b"\n \n" + GOOD_LINE + b"\n\n  ",
        b'{"instruction": "Name a tree.", "response": "Oak", "context": null}\n',
        b'{"instruction": "Name a tree.", "response": "Oak", "context": ""}\n',
        b'{"instruction": "Name a tree.", "response": "Oak", "n": [1e-3, 2, {"a": null}]}\n',
    ],
)
def test_what_is_merely_unusual_is_accepted(tmp_path, line):
    good, bad = read(tmp_path, line)
    assert [{k: v for k, v in r.items() if k in GOOD} for r in good] == [GOOD]
    assert bad == []


@pytest.mark.parametrize(
    "text",
    ["\ufeffzero\u200bwidth", "\ufffd", "\U0001f600", "  edges kept \n", "a\r\nb\tc", '"\\', "a\u2028b"],
)
def test_text_is_returned_character_by_character(tmp_path, text):
    for ascii_only in (True, False):
        line = json.dumps({"instruction": text, "response": "x"}, ensure_ascii=ascii_only).encode()
        assert read(tmp_path, line + b"\n") == ([{"instruction": text, "response": "x"}], [])


@pytest.mark.parametrize("cut", [10, len(GOOD_LINE) - 2])
def test_a_last_line_that_breaks_off_is_called_truncated(tmp_path, cut):
    assert read(tmp_path, GOOD_LINE + GOOD_LINE[:cut]) == ([GOOD], [(2, "truncated")])


def test_a_last_line_that_breaks_off_inside_a_character_is_called_truncated(tmp_path):
    assert read(tmp_path, GOOD_LINE + '{"instruction": "é'.encode()[:-1]) == ([GOOD], [(2, "truncated")])


@pytest.mark.parametrize(("extra", "bad"), [(0, []), (1, [(1, "long")])])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_limit_is_exact_and_does_not_count_the_line_end(tmp_path, extra, bad, end):
    line = b'{"instruction": "a", "response": "%s"}' % (b"x" * (2000 - 36 + extra))
    assert len(line) == 2000 + extra
    assert read(tmp_path, line + end)[1] == bad


@pytest.mark.parametrize(("levels", "bad"), [(9, []), (10, [(1, "deep")])])
def test_depth_counts_the_record_itself_and_no_bracket_inside_a_string(tmp_path, levels, bad):
    line = (
        b'{"instruction": "[[[[[[[[[[[[\\"[", "response": "x", "m": ' + b"[" * levels + b"]" * levels + b"}\n"
    )
    assert read(tmp_path, line)[1] == bad


def test_a_whole_number_passes_where_the_field_takes_numbers(tmp_path):
    fields = {"label": Field(number=True)}
    assert read(tmp_path, b'{"label": 0}\n{"label": true}\n{"label": 1.5}\n', fields=fields) == (
        [{"label": 0}],
        [(2, "type"), (3, "type")],
    )


def test_a_long_line_never_enters_memory_whole(tmp_path):
    [bad] = read_records(write(tmp_path, b"x" * 5_000_000 + b"\n"), FIELDS, LIMITS)
    assert isinstance(bad, BadRecord)
    assert len(bad.raw) <= 2002
    assert bad.length == 5_000_001


def write(tmp_path: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


# -- the claim of the whole module ------------------------------------------------------------------------


def test_of_four_thousand_lines_the_thousand_damaged_are_named_and_the_rest_are_unharmed(tmp_path):
    shuffle = random.Random(0)
    kinds = [DAMAGED[i % len(DAMAGED)] for i in range(1000)]
    assert len({code for code, _ in kinds}) >= 14
    originals = [
        {"instruction": f"Question {i} é\u200b", "response": "\n".join("x" * shuffle.randrange(1, 9))}
        for i in range(3000)
    ]
    lines = [(None, json.dumps(o, ensure_ascii=shuffle.random() < 0.5).encode(), o) for o in originals]
    order = sorted(shuffle.sample(range(4000), 1000))
    for place, (code, line) in zip(order, kinds, strict=True):
        lines.insert(place, (code, line, None))
    good, bad = read(tmp_path, b"".join(line + b"\n" for _, line, _ in lines))
    assert bad == [(n, code) for n, (code, _, _) in enumerate(lines, 1) if code is not None]
    assert len(bad) == 1000
    assert [json.dumps(r) for r in good] == [json.dumps(o) for o in originals]


def test_of_a_csv_of_four_thousand_records_the_thousand_damaged_are_named_and_the_rest_unharmed(tmp_path):
    shuffle = random.Random(1)
    damaged = [
        ("columns", b"a,b,c,d"),
        ("columns", b"a"),
        ("columns", b'"a,b"'),
        ("quote", b'a,"b,c'),
        ("quote", b'"a" b,c,d'),
        ("quote", b'a,5" nail,c'),
        ("utf8", b"caf\xe9,b,c"),
        ("control", b"a\x00,b,c"),
        ("bom", b"\xef\xbb\xbfa,b,c"),
        ("empty", b"a,,c"),
        ("empty", b' ,"b",c'),
        ("long", b"a,b," + b"c" * 2000),
    ]
    kinds = [damaged[i % len(damaged)] for i in range(1000)]
    originals = [
        {"instruction": f'Say "{i}", please', "response": "two\nlines\r\n" * (i % 3) + "x", "context": ","}
        for i in range(3000)
    ]
    chunks: list[tuple[str | None, bytes]] = [(None, as_csv([o])) for o in originals]
    for place, (code, line) in zip(sorted(shuffle.sample(range(4000), 1000)), kinds, strict=True):
        chunks.insert(place, (code, line + b"\n"))
    expected, line_number = [], 2
    for code, chunk in chunks:
        if code is not None:
            expected.append((line_number, code))
        line_number += chunk.count(b"\n")
    header = b"instruction,response,context\n"
    good, bad = read(tmp_path, header + b"".join(chunk for _, chunk in chunks), "data.csv")
    assert good == originals
    assert bad == expected


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(
        text, ["instruction", "response", "context"], delimiter=delimiter, lineterminator="\n"
    ).writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.jsonl.xz", "d.csv.gz", "d.json.bz2"]
)
@given(
    content=st.binary(max_size=400) | st.text(alphabet='[]{},:"\\\n\r\tab1é', max_size=200).map(str.encode)
)
@example(content=b"[[" * 300)
@example(content=b'[{"a": "' + b"\\" * 5)
@example(content=b"9" * 5000)
@example(content=b'"a","b\n"')
@settings(deadline=None, max_examples=150)
def test_no_bytes_raise_anything_but_a_data_error(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    packed = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    reading = Reading(max_bytes=100, max_depth=5)
    for stored in (packed(content), content):
        path.write_bytes(stored)
        try:
            lines = [record.place.line for record in read_records(path, FIELDS, reading)]
        except DataError:
            continue
        assert lines == sorted(lines)
        assert lines[-1] <= max(content.count(b"\n"), content.count(b"\r")) + 1


# -- a list of objects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_json_list_reads_like_json_lines(tmp_path, indent):
    rows = [{"instruction": f'{i} [{{",\\', "response": "]},\n" * i + "x"} for i in range(50)]
    assert read(tmp_path, b" \n" + json.dumps(rows, indent=indent).encode() + b"\n", "d.json") == (rows, [])


@pytest.mark.parametrize("shift", range(6))
def test_a_list_on_one_line_may_be_longer_than_what_is_read_at_once(tmp_path, shift):
    rows = [{"instruction": "a" * (shift + 1), "response": '\n]}"' * 30_000}, GOOD]  # marks at every offset
    assert read(tmp_path, json.dumps(rows).encode(), "d.json", Reading()) == (rows, [])


def test_elements_of_a_list_are_named_by_the_line_they_start_on(tmp_path):
    rows = [
        b'{\n"instruction": "a",\n"response": NaN}',
        GOOD_LINE.strip(),
        b"\n\n  7",
        b'{"instruction": "a,\n"response": "x"}',
        b'{"instruction": "' + b"x" * 70_000 + b'",\n\n "response": "x"}',
        GOOD_LINE.strip(),
        b"",
        GOOD_LINE.strip(),
    ]
    good, bad = read(tmp_path, b"[\n" + b",\n".join(rows) + b"\n]", "d.json")
    assert good == [GOOD] * 3
    #           line 2..4   5: good      8          9, 10        11..13   14: good   15: nothing but a comma
    assert bad == [(2, "number"), (8, "object"), (9, "json"), (11, "long"), (15, "json")]


def test_every_damage_that_fits_a_list_is_named_there_too(tmp_path):
    def balanced(line: bytes) -> bool:  # else the list itself is broken, and refused whole
        return line.count(b"[") == line.count(b"]") and line.count(b"{") == line.count(b"}")

    fits = [(code, line) for code, line in DAMAGED if balanced(line) and b'"a, "' not in line]
    assert len({code for code, _ in fits}) >= 14
    rows = [part for _, line in fits for part in (line, GOOD_LINE.strip())]
    good, bad = read(tmp_path, b"[" + b",\n".join(rows) + b"]", "d.json")
    assert bad == [(2 * i + 1, code) for i, (code, _) in enumerate(fits)]
    assert good == [GOOD] * len(fits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[\n" + GOOD_LINE + b",\n" + GOOD_LINE, r"d.json:4: the list has no end.*\(truncated\)"),
        (b"[" + GOOD_LINE + b',{"a": 1\n,' + GOOD_LINE + b"]", r"d.json:2: the list has no end"),
        (b"[" + GOOD_LINE + b"},{}]", r"d.json:2: a '}' closes nothing"),
        (b"[" + GOOD_LINE + b"] []", "d.json:2: there is text after the end"),
        (b"[" + GOOD_LINE + b"]\n" + GOOD_LINE, "d.json:3: there is text after the end"),
    ],
)
def test_a_list_whose_end_is_uncertain_is_refused_whole(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, "d.json")


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    assert read(tmp_path, GOOD_LINE * 2 + b"7\n", "d.json") == ([GOOD, GOOD], [(3, "object")])


# -- CSV --------------------------------------------------------------------------------------------------

HEADER = b"instruction,response,context\n"


@pytest.mark.parametrize(("name", "delimiter"), [("d.csv", ","), ("d.tsv", "\t")])
def test_a_record_over_several_lines_is_read_and_later_places_stay_right(tmp_path, name, delimiter):
    rows = [
        {"instruction": 'a "quoted" one', "response": "1\n\n\n2", "context": "x,\ty"},
        {"instruction": "b", "response": "c", "context": ""},
    ]
    header = HEADER.replace(b",", delimiter.encode())
    good, bad = read(tmp_path, header + as_csv(rows, delimiter) + b"one column\n", name)
    assert good == rows
    assert bad == [(7, "columns")]  # 1 header + 4 lines + 1 line


def test_a_quote_that_is_never_closed_costs_its_own_record_only(tmp_path):
    content = HEADER + b'a,"b,c\n' + b"a,b,c\n" * 5 + b'a,"b,c\n' + b'"a","b","c"\n' * 2
    good, bad = read(tmp_path, content, "d.csv")
    assert bad == [(2, "quote"), (8, "quote")]
    assert len(good) == 7


def test_an_open_quote_before_more_than_the_limit_costs_its_own_record_only(tmp_path):
    good, bad = read(tmp_path, HEADER + b'a,"b,c\n' + b"a,b,c\n" * 1000, "d.csv")  # 6,000 bytes > 2,000
    assert bad == [(2, "quote")]
    assert len(good) == 1000


@pytest.mark.parametrize("last", [b"a,b", b'a,b,"c', b"a,\xc3"])
def test_a_csv_that_breaks_off_is_called_truncated(tmp_path, last):
    good, bad = read(tmp_path, HEADER + b"a,b,c\n" + last, "d.csv")
    assert len(good) == 1
    assert bad == [(3, "truncated")]


def test_a_csv_may_have_other_columns_blank_lines_and_no_last_line_end(tmp_path):
    good, bad = read(tmp_path, b"\xef\xbb\xbfid,response,instruction\r\n1,b,a\r\n\r\n2,d,c", "d.csv")
    assert [r["instruction"] for r in good] == ["a", "c"]
    assert bad == []


def test_rows_that_hold_nothing_but_delimiters_are_passed_over_and_counted(tmp_path):
    told: list[tuple[str, str]] = []
    reading = Reading(tell=lambda file, what: told.append((file, what)))
    assert read(tmp_path, HEADER + b"a,b,c\n,,\n,,\n", "d.csv", reading)[1] == []
    assert told == [("d.csv", "2 rows hold nothing but delimiters and are skipped")]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"instruction,context\n", "none of its 2 columns is called 'response'"),
        (b"instruction,response,response\n", "two columns have the same name"),
        (b'instruction,"response\n', "a quote is not closed.*"),
        (b"instruction,respons\xe9\n", "not UTF-8.*"),
        (b"Which tree is this?,Oak\n", "none of its 2 columns is called 'instruction'"),
    ],
)
def test_a_csv_without_a_sound_header_is_refused_whole(tmp_path, header, message):
    with pytest.raises(DataError, match=rf"d.csv:1: .*{message} \(header\)"):
        read(tmp_path, header + b"a,b,c\n", "d.csv")


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_archives_read_like_plain_files(tmp_path, suffix, pack):
    content = b"\xef\xbb\xbf" + GOOD_LINE * 3 + b"7\n"
    assert read(tmp_path, pack(content), "d.jsonl" + suffix) == read(tmp_path, content)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_a_damaged_archive_is_refused_whole(tmp_path, suffix, pack):
    packed = pack(random.Random(0).randbytes(5000).hex().encode())
    flipped = packed[:-300] + bytes([packed[-300] ^ 255]) + packed[-299:]
    for damaged in (packed[:-20], packed[:3], flipped, GOOD_LINE):
        with pytest.raises(DataError, match=r"corrupt or truncated archive \(archive\)"):
            read(tmp_path, damaged, "d.jsonl" + suffix, Reading())


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"  "])
def test_a_file_without_a_record_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"holds no record \(empty-file\)"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "content"), [("d.json", b"[]"), ("d.csv", HEADER), ("d.jsonl.xz", lzma.compress(b""))]
)
def test_a_file_with_nothing_but_its_frame_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match=r"\(empty-file\)"):
        read(tmp_path, content, name)


def test_a_folder_a_missing_file_and_an_unknown_format_are_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name, code in [("folder.jsonl", "directory"), ("none.jsonl", "absent"), ("a.parquet", "format")]:
        with pytest.raises(DataError, match=code):
            next(read_records(tmp_path / name, FIELDS))


# -- what becomes of bad records --------------------------------------------------------------------------


def run_load(tmp_path: Path, content: bytes, **options):
    reading = Reading(max_bytes=2000, **options)
    return load(read_records(write(tmp_path, content), FIELDS, reading, name="d.jsonl"), lambda r: r, reading)


def test_fail_reads_everything_then_lists_each_cause_once_with_its_count(tmp_path):
    content = GOOD_LINE + b"7\n" * 11 + b'{"instruction": "secret text"}\n'
    with pytest.raises(DataError) as caught:
        run_load(tmp_path, content)
    text = str(caught.value)
    assert "12 of 13 records" in text
    assert "d.jsonl:2  object: a JSON number, not an object (11 records, this is the first)" in text
    assert "d.jsonl:13  missing: no field 'response'" in text
    assert len(text.splitlines()) == 6  # one cause, one line
    assert "object 11, missing 1" in text
    assert 'data.on_bad = "skip"' in text


@pytest.mark.parametrize(("code", "line"), DAMAGED, ids=lambda v: v if isinstance(v, str) else repr(v[:40]))
def test_no_reason_quotes_the_record(tmp_path, code, line):
    line = line.replace(b"xxx", b"QZX").replace(b'"x"', b'"QZX"').replace(b'"a"', b'"QZX"')
    with pytest.raises(DataError) as caught:
        run_load(tmp_path, GOOD_LINE + line + b"\n", max_depth=10)
    assert "QZX" not in str(caught.value)


def test_skip_keeps_what_it_leaves_out(tmp_path):
    quarantine = tmp_path / "new" / "quarantine.jsonl"
    latin = b'{"instruction": "caf\xe9", "response": "x"}'
    loaded = run_load(tmp_path, b"7\n" + GOOD_LINE + latin + b"\n", on_bad="skip", quarantine=quarantine)
    first, second = map(json.loads, quarantine.read_text().splitlines())
    assert (first["file"], first["line"], first["code"], first["raw"]) == ("d.jsonl", 1, "object", "7\n")
    assert second["line"] == 3
    assert base64.b64decode(second["raw_base64"]) == latin + b"\n"
    assert len(loaded) == 1
    assert loaded.bad == {"object": 1, "utf8": 1}


def test_skip_leaves_an_empty_quarantine_where_nothing_was_bad(tmp_path):
    quarantine = write(tmp_path, b"of an earlier run", "quarantine.jsonl")
    assert run_load(tmp_path, GOOD_LINE, on_bad="skip", quarantine=quarantine).bad == {}
    assert quarantine.read_text() == ""


def test_skip_still_refuses_data_without_one_good_record(tmp_path):
    with pytest.raises(DataError, match="2 of 2 records"):
        run_load(tmp_path, b"7\n7\n", on_bad="skip", quarantine=tmp_path / "q.jsonl")


def test_a_quarantine_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(DataError, match="Cannot write the quarantine file"):
        run_load(tmp_path, GOOD_LINE, on_bad="skip", quarantine=tmp_path)


def test_exact_repeats_are_counted_and_kept(tmp_path):
    loaded = run_load(tmp_path, GOOD_LINE * 3 + b'{"instruction": "other", "response": "x"}\n')
    assert len(loaded) == 4
    assert loaded.duplicates == 2


def test_what_was_loaded_is_a_sequence(tmp_path):
    loaded = run_load(tmp_path, GOOD_LINE * 3)
    assert [r.place.line for r in loaded] == [1, 2, 3]
    assert loaded[-1].place == Place("d.jsonl", 3)
    assert [r.place.line for r in loaded[:2]] == [1, 2]


def test_rows_from_elsewhere_meet_the_same_demands():
    rows = [GOOD, {"instruction": "a"}, {"instruction": "a", "response": "\ud800"}, {**GOOD, "response": " "}]
    checked = [check_row(Place("hub", n), row, FIELDS) for n, row in enumerate(rows, 1)]
    assert Counter(type(c) for c in checked) == {Record: 1, BadRecord: 3}
    assert [c.code for c in checked[1:]] == ["missing", "surrogate", "empty"]


@pytest.mark.parametrize("options", [{"on_bad": "ignore"}, {"max_bytes": 0}, {"max_depth": 1000}])
def test_a_policy_that_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigError):
        Reading(**options)
