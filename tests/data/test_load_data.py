"""From settings to who holds what: owners that stay, test sets of one's own, and settings that do not fit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fedloom.data import sources
from fedloom.errors import ConfigError, DataError
from fedloom.experiment.datasets import load_data
from fedloom.experiment.toml import load, parse


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def tasks(start: int, count: int, **more: str) -> list[dict]:
    return [
        {"instruction": f"Task {i}", "input": "", "output": f"Done {i}", **more}
        for i in range(start, start + count)
    ]


def data_of(*settings: str):
    return load_data(parse("", "test", ['data.source="alpaca"', *settings]))


def owned(tmp_path: Path) -> str:
    """Eight owners of one example, 32 of six."""
    rows = [
        {"instruction": f"q{o}-{k}", "response": "a", "category": "ab"[k % 2], "owner": f"o{o:02}"}
        for o in range(40)
        for k in range(1 if o < 8 else 6)
    ]
    return f'data.path="{write(tmp_path / "d.json", rows)}"'


TABLE = ['data.source="table"', "data.partition.kind=by_owner"]


def test_no_owner_is_lost_to_a_hold_out_by_category(tmp_path):
    for seed in range(5):
        data = data_of(owned(tmp_path), *TABLE, "data.hold_out=80", f"seed={seed}")
        assert len(data.clients) == 40
        assert len(data.test) == 160 // 2 + 20  # half of each category: a 104, b 96
        assert not data.notes


def test_owners_lost_to_a_part_of_the_data_are_named(tmp_path):
    data = data_of(owned(tmp_path), *TABLE, "data.examples=100", "data.pool=20", "data.hold_out=10")
    assert data.notes[0] == "data.examples = 100: 100 of 200 examples, drawn at random."
    named = [n for n in data.notes if "owners have no example left" in n]
    assert [n.partition(" after ")[2].partition(" and so")[0] for n in named] == [
        "data.examples = 100",
        "data.pool = 20",
    ]
    assert sum(int(n.split()[0]) for n in named) == 40 - len(data.clients)


@pytest.mark.parametrize("kind", ["shards", "dirichlet", "by_label", "shepherd_dirichlet"])
def test_a_split_by_category_of_data_without_any_is_refused(tmp_path, kind):
    path = write(tmp_path / "d.json", [{"instruction": f"q{i}", "response": "a"} for i in range(60)])
    with pytest.raises(ConfigError, match="60 of 60 examples name no category") as caught:
        data_of('data.source="table"', f'data.path="{path}"', "data.clients=4", f"data.partition.kind={kind}")
    assert "data.clusters" in str(caught.value)


def test_data_without_categories_may_be_split_at_random_and_it_is_said(tmp_path):
    data = data_of(f'data.path="{write(tmp_path / "d.json", tasks(0, 60))}"', "data.clients=4")
    assert len(data.test) == 10
    assert data.notes == ["No example names a category: 10 of all 60 examples are held out."]
    assert set(data.groups()) == set(data.table.totals) == {"no category"}


# -- a file, a client -------------------------------------------------------------------------------------


def test_one_file_is_one_client(tmp_path):
    for client in range(3):
        write(tmp_path / "10" / f"local_training_{client}.json", tasks(10 * client, 6 + client))
    test = write(tmp_path / "global_test.json", tasks(100, 4))
    data = data_of(
        f'data.path="{tmp_path}/10/local_training_*.json"',
        "data.owner=file",
        "data.partition.kind=by_owner",
        f'data.test_path="{test}"',
    )
    assert {c: len(own) for c, own in data.clients.items()} == {
        f"local_training_{i}": 6 + i for i in range(3)
    }
    assert [e.instruction for e in data.test] == [f"Task {i}" for i in range(100, 104)]


def test_files_of_one_name_in_two_folders_are_two_owners(tmp_path):
    for folder in ("x", "y"):
        write(tmp_path / folder / "data.json", tasks(0, 2))
    examples, _ = sources.load("alpaca", f"{tmp_path}/*/data.json", owner="file")
    assert Counter(e.owner for e in examples) == {"x/data": 2, "y/data": 2}


def test_files_that_differ_in_their_endings_alone_are_two_owners(tmp_path):
    write(tmp_path / "a.json", tasks(0, 1))
    (tmp_path / "a.jsonl").write_text(json.dumps(tasks(1, 1)[0]))
    examples, _ = sources.load("alpaca", str(tmp_path), owner="file")
    assert [e.owner for e in examples] == ["a.json", "a.jsonl"]


def test_a_column_called_file_is_a_column(tmp_path):
    path = write(
        tmp_path / "d.json", [{"instruction": "a", "response": "b", "file": f"f{i}"} for i in range(3)]
    )
    examples, _ = sources.load("table", str(path), columns={"owner": "file"})
    assert [e.owner for e in examples] == ["f0", "f1", "f2"]


def test_an_owner_of_which_no_use_is_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'set data\.partition\.kind = "by_owner"'):
        data_of(f'data.path="{write(tmp_path / "d.json", tasks(0, 9))}"', "data.owner=file", "data.clients=2")


# -- a test set of one's own ------------------------------------------------------------------------------


def test_what_the_test_set_asks_is_left_out_of_training_and_counted(tmp_path):
    path, test = write(tmp_path / "d.json", tasks(0, 20)), write(tmp_path / "t.json", tasks(15, 10))
    data = data_of(f'data.path="{path}"', f'data.test_path="{test}"', "data.clients=2")
    trained = {e.instruction for own in data.clients.values() for e in own}
    assert trained == {f"Task {i}" for i in range(15)}
    assert len(data.test) == 10  # nothing is held out besides
    assert data.notes == [
        "5 of 20 training examples ask what the test set asks, and are left out of training."
    ]


def test_a_damaged_test_set_has_a_quarantine_of_its_own(tmp_path):
    path = write(tmp_path / "d.json", [*tasks(0, 20), {}])
    test = write(tmp_path / "t.json", [*tasks(50, 5), {}, {}])
    experiment = parse(
        "",
        "test",
        [
            'data.source="alpaca"',
            f'data.path="{path}"',
            f'data.test_path="{test}"',
            "data.clients=2",
            "data.on_bad=skip",
        ],
    )
    data = load_data(experiment, quarantine=tmp_path / "quarantine.jsonl")
    assert data.read["bad"] == {"missing": 1}
    assert data.read["test_set"]["bad"] == {"missing": 2}
    assert len((tmp_path / "test-quarantine.jsonl").read_text().splitlines()) == 2
    assert [n.partition(" records")[0] for n in data.notes] == ["1 of 21", "test set: 2 of 7"]


ANSWERS = ["gpt-4", "gpt-3.5-turbo", "text-davinci-003", "claude-2"]
MED = [
    {"instruction": f"Explain {i}", "input": "<noinput>", **dict.fromkeys(ANSWERS, f"answer {i}")}
    for i in range(9)
]


@pytest.mark.parametrize("source", ["alpaca", "alpacare", "table", "dolly"])
def test_the_answers_of_several_models_are_named_where_the_source_is_the_wrong_one(tmp_path, source):
    with pytest.raises(DataError) as caught:
        sources.load(source, str(write(tmp_path / "MedInstruct-test.json", MED)))
    assert ", ".join(ANSWERS) in str(caught.value)
    assert 'response = "gpt-4"' in str(caught.value)


def test_one_of_several_answers_may_be_the_test_sets_response(tmp_path):
    path, test = write(tmp_path / "d.json", tasks(0, 20)), write(tmp_path / "MedInstruct-test.json", MED)
    settings = ['data.source="alpacare"', f'data.path="{path}"', f'data.test_path="{test}"', "data.clients=2"]
    with pytest.raises(DataError, match=r"data\.test_columns"):
        data_of(*settings)
    data = data_of(*settings, 'data.test_columns={response="claude-2"}')
    assert [(e.response, e.context) for e in data.test] == [(f"answer {i}", "") for i in range(9)]


# -- settings of a recipe for another source --------------------------------------------------------------


def test_settings_that_do_not_fit_the_source_are_named_together(tmp_path):
    path = write(tmp_path / "d.json", tasks(0, 60))
    with pytest.raises(ConfigError) as caught:
        load_data(load("quickstart", ["data.source=alpaca", f"data.path={path}", "data.split=test"]))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "data.split:",
        "data.private_facts",
        "data.partition.kind",
        "data.examples",
    ]


def test_nothing_that_is_read_from_files_goes_with_the_microworld():
    with pytest.raises(ConfigError, match=r"(?s)data.path: .*data.delimiter: .*data.on_bad: "):
        load_data(load("quickstart", ["data.path=d.json", "data.delimiter=;", "data.on_bad=skip"]))


def test_drawing_a_part_of_the_data_is_said(tmp_path):
    data = data_of(
        f'data.path="{write(tmp_path / "d.json", tasks(0, 60))}"', "data.clients=2", "data.examples=40"
    )
    assert data.notes[0] == "data.examples = 40: 40 of 60 examples, drawn at random."
