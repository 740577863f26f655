"""Each source turns its records into examples, and says where each came from."""

from __future__ import annotations

import json
import lzma
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.data import sources
from fedloom.data.example import Example
from fedloom.data.records import Reading
from fedloom.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROW = {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "summarization"}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dolly_reads_all_four_fields(tmp_path):
    [example] = sources.dolly(write(tmp_path / "dolly.jsonl", ROW))
    assert example == Example("Sum up.", "Short.", "Long.", "summarization", id="dolly.jsonl:1")


@pytest.mark.parametrize(("name", "dump"), [("a.json", lambda r: json.dumps([r])), ("a.jsonl", json.dumps)])
def test_alpaca_reads_a_list_or_lines(tmp_path, name, dump):
    (tmp_path / name).write_text(dump({"instruction": "Add.", "input": "1 1", "output": "2"}))
    assert list(sources.alpaca(tmp_path / name)) == [Example("Add.", "2", "1 1", id=f"{name}:1")]


def test_alpaca_does_without_an_input(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Go.", "output": "Gone."})
    assert sources.alpaca(path)[0].context == ""


SEED = {
    "topic": "Neurology",
    "view": "Student",
    "type": "Open Q&A",
    "instruction": "Explain it.",
    "input": "<noinput>",
    "difficulty": "1",
}


@pytest.mark.parametrize(("name", "dump"), [("m.json", lambda r: json.dumps([r])), ("m.jsonl", json.dumps)])
def test_alpacare_reads_medinstruct_in_alpacas_shape(tmp_path, name, dump):
    (tmp_path / name).write_text(dump({"instruction": "Name it.", "input": "A rash.", "output": "Eczema."}))
    assert list(sources.alpacare(tmp_path / name)) == [
        Example("Name it.", "Eczema.", "A rash.", id=f"{name}:1")
    ]


def test_alpacare_takes_the_topic_of_an_answered_seed_as_its_category(tmp_path):
    [example] = sources.alpacare(write(tmp_path / "m.jsonl", {**SEED, "output": "So."}))
    assert example == Example("Explain it.", "So.", category="Neurology", id="m.jsonl:1")


@pytest.mark.parametrize(
    ("given", "context"),
    [("<noinput>", ""), ("NA", ""), (" <noinput>\n", ""), ("NAD+", "NAD+"), ("", ""), (None, "")],
)
def test_alpacare_knows_how_its_files_say_that_there_is_no_input(tmp_path, given, context):
    path = write(tmp_path / "m.jsonl", {**SEED, "input": given, "output": "So."})
    assert sources.alpacare(path)[0].context == context


@pytest.mark.parametrize("reading", [Reading(), Reading(on_bad="skip")])
@pytest.mark.parametrize("row", [SEED, {**SEED, "output": " "}, {**SEED, "output": None}])
def test_alpacares_seeds_are_refused_with_the_reason_and_not_line_by_line(tmp_path, row, reading):
    with pytest.raises(DataError) as caught:
        sources.alpacare(write(tmp_path / "med_seed.jsonl", *[row] * 167), reading)
    assert str(caught.value).startswith("None of the 167 records has a response (field 'output').")
    assert "instructions without responses" in str(caught.value)
    assert "MedInstruct-52k" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alpacare_names_the_records_without_a_response_where_others_have_one(tmp_path):
    path = write(tmp_path / "m.jsonl", SEED, {**SEED, "output": "So."}, {**SEED, "output": ""})
    with pytest.raises(DataError) as caught:
        sources.alpacare(path)
    assert "m.jsonl:1  missing: no field 'output'" in str(caught.value)
    assert "m.jsonl:3  empty: 'output' is blank" in str(caught.value)
    examples, report = sources.load("alpacare", str(path), on_bad="skip")
    assert (len(examples), report["bad"]) == (1, {"empty": 1, "missing": 1})


def test_alpacare_lists_what_else_is_wrong_with_a_file(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"instruction": "a", "output": 3}\nnot JSON\n')
    with pytest.raises(DataError, match="2 of 2 records cannot be used") as caught:
        sources.alpacare(tmp_path / "m.jsonl")
    assert "'output' is a number" in str(caught.value)


def test_medquad_takes_the_institution_as_the_owner(tmp_path):
    row = {"source": "CDC", "qtype": "symptoms", "question": "What is it?", "answer": "A cold.", "focus": ""}
    [example] = sources.medquad(write(tmp_path / "m.jsonl", row))
    assert (example.instruction, example.response) == ("What is it?", "A cold.")
    assert (example.owner, example.category, example.context) == ("CDC", "symptoms", "")


def test_a_source_refuses_what_it_cannot_learn_from(tmp_path):
    path = write(
        tmp_path / "d.jsonl", ROW, {**ROW, "response": " "}, {**ROW, "category": ""}, {**ROW, "context": ""}
    )
    with pytest.raises(DataError) as caught:
        sources.dolly(path)
    assert "2 of 4 records" in str(caught.value)
    assert "d.jsonl:2  empty: 'response' is blank" in str(caught.value)
    assert "d.jsonl:3  empty: 'category' is blank" in str(caught.value)


def test_a_table_maps_columns_and_turns_whole_numbers_into_labels(tmp_path):
    row = {"q": "Why?", "a": "Because.", "hospital": 7, "kind": 0}
    columns = {"instruction": "q", "response": "a", "owner": "hospital", "category": "kind"}
    [example] = sources.table(write(tmp_path / "t.jsonl", row), columns)
    assert example == Example("Why?", "Because.", category="0", owner="7", id="t.jsonl:1")


def test_a_table_takes_our_own_names_where_it_has_them(tmp_path):
    assert sources.table(write(tmp_path / "t.jsonl", ROW))[0].category == "summarization"


def test_a_mapped_column_must_be_in_every_record(tmp_path):
    path = write(tmp_path / "t.jsonl", ROW, {"instruction": "a", "response": "b"})
    assert len(sources.table(path)) == 2
    with pytest.raises(DataError, match=r"t\.jsonl:2  missing: no field 'category'"):
        sources.table(path, {"category": "category"})


def test_one_column_may_serve_twice_and_then_meets_the_stricter_demand(tmp_path):
    columns = {"context": "topic", "category": "topic"}
    row = {"instruction": "a", "response": "b", "topic": "trees"}
    [example] = sources.table(write(tmp_path / "t.jsonl", row), columns)
    assert example.context == example.category == "trees"
    with pytest.raises(DataError, match="'topic' is blank"):
        sources.table(write(tmp_path / "t.jsonl", {**row, "topic": ""}), columns)


def test_a_table_reads_csv(tmp_path):
    (tmp_path / "t.csv").write_text('q,a\n"Two\nlines",yes\nOne,no\n')
    examples = sources.table(tmp_path / "t.csv", {"instruction": "q", "response": "a"})
    assert [(e.instruction, e.id) for e in examples] == [("Two\nlines", "t.csv:2"), ("One", "t.csv:4")]


def test_an_unknown_column_of_ours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Unknown column 'answer'; ours are instruction, response"):
        sources.table(write(tmp_path / "t.jsonl", ROW), {"answer": "response"})


def test_a_folder_gives_its_readable_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "inner/c.jsonl"):
        write(tmp_path / name, ROW)
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(json.dumps(ROW).encode()))
    assert [e.id for e in sources.table(tmp_path)] == ["a.jsonl:1", "b.jsonl:1", "c.jsonl.xz:1"]


def test_a_pattern_gives_its_matches_and_ids_stay_unique(tmp_path):
    for name in ("x/data.jsonl", "y/data.jsonl"):
        write(tmp_path / name, ROW)
    examples = sources.table(f"{tmp_path}/*/data.jsonl")
    assert [e.id for e in examples] == ["x/data.jsonl:1", "y/data.jsonl:1"]
    assert examples.duplicates == 1


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    assert len(sources.table(write(tmp_path / "data[1].jsonl", ROW))) == 1


def test_several_paths_are_read_in_the_order_given(tmp_path):
    paths = [write(tmp_path / name, ROW) for name in ("b.jsonl", "a.jsonl")]
    assert [e.id for e in sources.table(paths)] == ["b.jsonl:1", "a.jsonl:1"]


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (["none.jsonl"], DataError, "none.jsonl: no such file"),
        (["*.csv"], DataError, r"\*.csv: no such file"),
        (["empty"], DataError, "empty-folder"),
        ([], ConfigError, "at least one file"),
        (["a.jsonl", "*.jsonl"], ConfigError, "named twice"),
        (["a.docx"], DataError, "cannot tell the format"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(tmp_path, paths, error, message):
    write(tmp_path / "a.jsonl", ROW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        sources.table([tmp_path / path for path in paths])


def test_load_reports_what_was_left_out(tmp_path):
    path = write(tmp_path / "d.jsonl", ROW, ROW, {**ROW, "response": ""})
    quarantine = tmp_path / "quarantine.jsonl"
    examples, report = sources.load("dolly", str(path), on_bad="skip", quarantine=quarantine)
    assert len(examples) == 2
    assert report == {
        "records": 2,
        "bad": {"empty": 1},
        "duplicates": 1,
        "notes": ["1 of 3 records are left out: 'response' is blank (1); they are in quarantine.jsonl."],
    }
    assert json.loads(quarantine.read_text())["line"] == 3


def test_load_skips_without_a_quarantine_file_in_a_preview(tmp_path):
    path = write(tmp_path / "d.jsonl", ROW, {})
    assert sources.load("dolly", str(path), on_bad="skip")[1]["bad"] == {"missing": 1}


def test_load_maps_the_columns_of_a_table(tmp_path):
    path = write(tmp_path / "t.jsonl", {"q": "a", "r": "b"})
    assert (
        sources.load("table", str(path), columns={"instruction": "q", "response": "r"})[0][0].response == "b"
    )


@pytest.mark.parametrize(
    ("source", "path", "options", "message"),
    [
        ("dolly", None, {}, "needs data.path, the file to read"),
        ("hub", None, {}, "needs data.path, the data set's id"),
        ("hub", ["a", "b"], {}, "takes one data set id"),
        ("dolly", "d.jsonl", {"columns": {"instruction": "q"}}, "has fixed columns"),
    ],
)
def test_load_refuses_settings_that_make_no_sense(source, path, options, message):
    with pytest.raises(ConfigError, match=message):
        sources.load(source, path, **options)


# -- the Hub ----------------------------------------------------------------------------------------------


class Rows(list):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def library(monkeypatch):
    """Stands for the package datasets: remembers calls and whether they could use the network."""
    calls: list[tuple] = []
    fake = SimpleNamespace(config=SimpleNamespace(HF_HUB_OFFLINE=False), calls=calls, answer=Rows([ROW]))

    def load_dataset(*args, **options):
        calls.append((args, options, fake.config.HF_HUB_OFFLINE))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return fake.answer

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_hub_rows_become_examples_named_by_row(library):
    library.answer = Rows([{"q": "a", "r": "b"}, {"q": "c", "r": "d"}])
    examples = sources.hub("owner/set", {"instruction": "q", "response": "r"})
    assert [(e.instruction, e.id) for e in examples] == [("a", "owner/set:1"), ("c", "owner/set:2")]


def test_hub_rows_meet_the_demands_of_the_strict_reader(library):
    library.answer = Rows([ROW, {**ROW, "response": None}])
    with pytest.raises(DataError, match="owner/set:2  null: 'response' is null"):
        sources.hub("owner/set")
    assert len(sources.hub("owner/set", reading=Reading(on_bad="skip"))) == 1


def test_hub_asks_for_subset_split_and_revision(library):
    sources.hub("owner/set:main", split="test", revision="abc")
    assert library.calls[0][:2] == (("owner/set", "main"), {"split": "test", "revision": "abc"})


@pytest.mark.parametrize(
    ("allow", "environment", "offline"),
    [(False, False, True), (True, False, False), (True, True, True), (False, True, True)],
)
def test_hub_uses_the_network_only_where_both_the_user_and_the_environment_allow_it(
    library, allow, environment, offline
):
    library.config.HF_HUB_OFFLINE = environment
    sources.hub("owner/set", allow_download=allow)
    assert library.calls[0][2] is offline
    assert library.config.HF_HUB_OFFLINE is environment  # as it was before


def test_hub_says_what_to_do_when_it_may_not_download(library):
    library.answer = ConnectionError("could not reach it\nmany more lines")
    with pytest.raises(ConfigError, match=r"'owner/set'.*allow_download = true.*ConnectionError") as caught:
        sources.hub("owner/set")
    assert "many more lines" not in str(caught.value)


def test_hub_names_the_columns_there_are(library):
    with pytest.raises(
        DataError, match=r"no column 'q' .* They are: instruction, context, response, category"
    ):
        sources.hub("owner/set", {"instruction": "q"})


def test_hub_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "fedloom\[data\]"'):
        sources.hub("owner/set")


def test_hub_reads_a_local_folder_of_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pq"
    folder.mkdir()
    datasets.Dataset.from_list([ROW, {**ROW, "context": None}]).to_parquet(folder / "train.parquet")
    examples = sources.hub(str(folder))
    assert [(e.context, e.id) for e in examples] == [("Long.", "pq:1"), ("", "pq:2")]


# -- Parquet by path --------------------------------------------------------------------------------------


def test_parquet_is_read_by_path_and_its_rows_meet_the_same_demands(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"q": "a", "r": "b", "m": {"k": [1]}},
        {"q": None, "r": "d", "m": None},
        {"q": "c", "r": "d", "m": None},
    ]
    for name in ("x/p.parquet", "y/p.parquet"):
        (tmp_path / name).parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    columns = {"instruction": "q", "response": "r"}
    for path in (f"{tmp_path}/*/p.parquet", [f"{tmp_path}/x", f"{tmp_path}/y"]):
        examples, report = sources.load("table", path, columns=columns, on_bad="skip", owner="file")
        assert [(e.instruction, e.owner) for e in examples] == [
            ("a", "x/p"),
            ("c", "x/p"),
            ("a", "y/p"),
            ("c", "y/p"),
        ]
        assert report["bad"] == {"null": 2}
    with pytest.raises(DataError, match=r"x/p\.parquet:2  null: 'q' is null \(2 records"):
        sources.table(f"{tmp_path}/*/p.parquet", columns)
    with pytest.raises(DataError, match=r"no column 'instruction' .* They are: q, r, m"):
        sources.table(tmp_path / "x" / "p.parquet")
    with pytest.raises(DataError, match=r"'m' is a object, not text|'m' is an object, not text"):
        sources.table(tmp_path / "x" / "p.parquet", {"instruction": "m", "response": "r"})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a Parquet file, or a damaged one"):
        sources.table(tmp_path / "bad.parquet", columns)


def test_parquet_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r'pip install "fedloom\[data\]"'):
        sources.table(tmp_path / "p.parquet")


def test_what_is_not_read_in_a_folder_is_said(tmp_path):
    for name in ("a.jsonl", ".a.jsonl", "notes.txt", "inner/c.jsonl"):
        write(tmp_path / name, ROW)
    examples, report = sources.load("table", str(tmp_path))
    assert len(examples) == 1
    assert report["notes"] == ["not read in that folder: inner/, notes.txt"]


# -- the published files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "file", "records", "duplicates", "categories", "owners", "notes"),
    [
        ("dolly", "databricks-dolly-15k.jsonl.xz", 15_011, 8, 8, 1, []),
        (
            "medquad",
            "medquad.jsonl.xz",
            16_407,
            0,
            16,
            9,
            ["columns that are not used: collection, url, focus, qid"],
        ),
    ],
)
def test_a_published_file_has_no_bad_record(source, file, records, duplicates, categories, owners, notes):
    if not (SHARED / file).exists():
        pytest.skip(f"{file} is not here")
    examples, report = sources.load(source, str(SHARED / file))
    assert report == {"records": records, "bad": {}, "duplicates": duplicates, "notes": notes}
    assert len(Counter(e.category for e in examples)) == categories
    assert len(Counter(e.owner for e in examples)) == owners
    assert [e.id for e in examples] == [f"{file}:{n}" for n in range(1, records + 1)]
