"""Every command at tiny size, as a person would type it; every mistake is one message and an exit code."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedloom.cli import console
from fedloom.cli import main as cli
from fedloom.experiment.toml import load, recipes
from fedloom.storage import checkpoint

TINY = [
    "model.base=random:llama",
    "rounds=2",
    "adapter.rank=1",
    "adapter.targets=q_proj",
    "data.examples=32",
    "data.clients=2",
    "data.hold_out=1",
    "examples_per_round=2",
    "evaluation.answers=2",
    "evaluation.max_new_tokens=4",
    "compare.seeds=2",
]


@dataclass(frozen=True)
class Typed:
    code: int
    out: str
    err: str


def type_in(*words: str | Path, stdin: str | io.TextIOWrapper = "") -> Typed:
    """`fedloom WORDS`, in this process."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["fedloom", *map(str, words)])
        patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        patch.setattr(console.out, "width", 200)
        patch.setattr(console.err, "width", 200)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Typed(code, out.getvalue(), err.getvalue())


def refused(*words: str | Path, **options: str) -> str:
    """The one message of a command that must fail by a mistake of whoever typed it."""
    done = type_in(*words, **options)
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.count("fedloom: ") == 1
    return done.err.partition("fedloom: ")[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = type_in("run", *TINY, "--out", folder)
    assert done.code == 0, done
    (folder / "said.out").write_text(done.out)
    (folder / "said.err").write_text(done.err)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what each command does ------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert {"experiment.toml", "metrics.jsonl", "summary.json", "report.html", "adapter", "state"} <= names
    assert {p.name for p in (finished / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "fedloom.json",
    }
    assert not list(finished.rglob("*.partial"))


def test_a_piped_run_says_a_line_a_round(finished: Path) -> None:
    lines = (finished / "said.err").read_text().splitlines()
    assert [line.split(" · ")[0] for line in lines if line.startswith("round ")] == ["round 1/2", "round 2/2"]
    first = next(line for line in lines if line.startswith("round "))
    assert all(word in first for word in ("clients", "train loss", "held-out", "tokens/s", "up ", "down "))
    assert "\x1b" not in "".join(lines)


def test_a_run_ends_with_its_table_and_where_things_are(finished: Path) -> None:
    said = (finished / "said.out").read_text()
    assert all(
        word in said
        for word in ("base", "federated", "loss", str(finished / "report.html"), str(finished / "adapter"))
    )


def test_the_summary_names_its_rows_and_the_adapter(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {r["row"] for r in summary["rows"]} == {"base", "federated"}
    assert {"row", "method", "metric", "mean", "ci95", "seeds"} <= summary["rows"][0].keys()
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["adapter_sha256"] == last["adapter_sha256"]
    assert [r["bytes_up"] > 0 for r in summary["rounds"]] == [False, True, True]


def test_resuming_a_finished_run_only_reads_it(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    done = type_in("run", "--resume", "--out", finished)
    assert done.code == 0
    assert done.out == (finished / "said.out").read_text()
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_can_be_repeated_from_its_folder(finished: Path, tmp_path: Path) -> None:
    assert type_in("run", finished, "--out", tmp_path / "again").code == 0
    shas = [
        json.loads((f / "summary.json").read_text())["adapter_sha256"] for f in (finished, tmp_path / "again")
    ]
    assert shas[0] == shas[1]


def test_without_out_every_run_gets_a_folder_of_its_own(here: Path) -> None:
    (here / "runs" / "quickstart-1").mkdir(parents=True)
    assert type_in("run", *TINY, "evaluation.answers=0", "rounds=1").code == 0
    assert (here / "runs" / "quickstart-2" / "summary.json").exists()


def test_describe_tells_the_costs_and_trains_nothing(here: Path) -> None:
    done = type_in("describe", *TINY)
    assert done.code == 0
    assert all(
        word in done.out
        for word in (
            "2 clients tune random:llama by FedIT, in 2 rounds of 2",
            "parameters",
            "up, ",
            "memory",
            "held out",
        )
    )
    assert list(here.iterdir()) == []


def test_describe_counts_the_bytes_that_will_travel(finished: Path) -> None:
    from fedloom.experiment.plan import plan

    planned, lines = plan(load(finished)), (finished / "metrics.jsonl").read_text().splitlines()
    measured = json.loads(lines[-1])
    clients = len(measured["cohort"])
    assert abs(planned.bytes_down - measured["bytes_down"] / clients) <= 8  # headers are padded to 8 bytes
    assert planned.bytes_up == pytest.approx(
        measured["bytes_up"] / clients, rel=0.02
    )  # its metrics are digits


def test_partition_shows_who_holds_what(here: Path) -> None:
    done = type_in("partition", *TINY, "--out", "picture.html")
    assert done.code == 0
    assert all(word in done.out for word in ("client-000", "client-001", "open_qa", "held out"))
    assert "<html" in (here / "picture.html").read_text()


def test_a_copied_recipe_runs_as_the_shipped_one(here: Path) -> None:
    assert type_in("copy", "quickstart", "mine.toml").code == 0
    assert (here / "mine.toml").read_text() == recipes()["quickstart"]
    assert load("mine.toml") == load("quickstart")


def test_a_recipe_is_copied_into_a_folder_too(here: Path) -> None:
    assert type_in("copy", "quickstart", ".").code == 0
    assert (here / "quickstart.toml").exists()


def test_evaluate_measures_the_saved_adapter_as_the_run_did(finished: Path) -> None:
    done = type_in("evaluate", finished)
    assert done.code == 0
    again = json.loads((finished / "evaluation.json").read_text())["rows"]["federated"]["metrics"]
    summary = json.loads((finished / "summary.json").read_text())
    assert again == {r["metric"]: r["mean"] for r in summary["rows"] if r["row"] == "federated"}


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_export_writes_a_model_for_other_tools(finished: Path, tmp_path: Path, form: str) -> None:
    assert type_in("export", finished, "--to", form, "--out", tmp_path / "model").code == 0
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert (
        {"adapter_model.safetensors"} if form == "peft" else {"model.safetensors", "config.json"}
    ) <= names


def test_report_makes_the_page_again(finished: Path) -> None:
    page = finished / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert type_in("report", finished).code == 0
    assert page.read_bytes() == before


def test_chat_answers_until_an_empty_line(finished: Path) -> None:
    done = type_in(
        "chat", finished, "--max-new-tokens", "3", stdin="What is red? || A fox.\nAnd now?\n\nNot asked.\n"
    )
    assert done.code == 0
    assert len(done.out.splitlines()) >= 2


def test_chat_reads_a_question_longer_than_a_training_sequence_and_says_what_it_cannot_read(
    finished: Path,
) -> None:
    long, too_long = (
        "What is red? " * 60,
        "What is red? || " + "A fox. " * 2000,
    )  # training sequences have 512 tokens, the model reads 1,024
    done = type_in("chat", finished, "--max-new-tokens", "3", stdin=f"{long}\n{too_long}\n\n")
    assert done.code == 0
    assert done.err.count("is left out") == 1
    assert "the end of the context is left out: the base model reads 1,024 tokens." in done.err


def test_chat_says_whose_model_answers_and_switches_to_its_base(finished: Path) -> None:
    done = type_in(
        "chat", finished, "--max-new-tokens", "2", stdin="One\n/base\nOne\n/what\n/help\n/quit\nNot asked\n"
    )
    assert done.code == 0
    assert f"{finished}: the adapter of 2 clients tuned by FedIT on random:llama, seed 0" in done.err
    assert "The base model random:llama, untuned" in done.err
    assert "There is no /what." in done.err
    assert len(done.out.splitlines()) == 2
    assert done.err.count("… cut at 2 tokens") == 2


def test_ctrl_c_stops_an_answer_and_not_the_chat(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, seed: int, **__: object) -> Iterator[int]:
        yield 5
        if seed == 1:
            raise KeyboardInterrupt
        yield 6

    monkeypatch.setattr("fedloom.experiment.chat.stream", interrupted)
    done = type_in("chat", finished, stdin="One\nTwo\n")
    assert done.code == 0
    assert done.err.count("… stopped") == 1
    assert len(done.out.splitlines()) == 2


def test_ctrl_c_at_the_prompt_ends_the_chat(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(console.err, "input", interrupted)
    assert type_in("chat", finished).code == 0


def test_bytes_that_are_no_text_end_a_chat_with_a_sentence(finished: Path) -> None:
    piped = io.TextIOWrapper(io.BytesIO("Gut\nWas ist gr\u00fcn?\n".encode("latin-1")), encoding="utf-8")
    done = type_in("chat", finished, "--max-new-tokens", "2", stdin=piped)
    assert done.code == 2
    assert "Line 2 of what was typed or piped in is not UTF-8 at its character 11" in done.err
    assert "Traceback" not in done.err
    assert len(done.out.splitlines()) == 1


def test_help_names_every_command() -> None:
    done = type_in("--help")
    assert done.code == 0
    assert all(
        name in done.out
        for name in (
            "run",
            "compare",
            "describe",
            "partition",
            "copy",
            "evaluate",
            "chat",
            "export",
            "report",
            "recipes",
            "--version",
        )
    )


@pytest.mark.slow
def test_compare_runs_its_seeds_side_by_side_and_resumes(tmp_path: Path) -> None:
    done = type_in("compare", *TINY, "machine.workers=2", "--out", tmp_path / "c")
    assert done.code == 0, done
    assert all(word in done.out for word in ("base", "local mean", "local best", "federated", "centralised"))
    lines = done.err.splitlines()
    assert "over 2 seeds" in lines[0]
    assert done.out.count("Taking part or tuning alone, each judged on its own mix of data") == 1
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert all(r["seeds"] == [0, 1] and len(r["values"]) == 2 for r in summary["rows"])
    # As if it had been killed before the second seed's result and the summary.
    (tmp_path / "c" / "summary.json").unlink()
    (tmp_path / "c" / "seed-1" / "result.json").unlink()
    assert type_in("compare", "--resume", "--out", tmp_path / "c").code == 0
    again = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert again["provenance"]["started"] == summary["provenance"]["started"]
    again["provenance"]["finished"] = summary["provenance"]["finished"]
    assert again == summary


# --- every mistake ---------------------------------------------------------------------------------------


def test_a_recipe_that_is_none_is_guessed() -> None:
    assert "did you mean 'quickstart'?" in refused("run", "quikstart")


def test_a_file_that_is_not_there() -> None:
    assert "there is no 'mine.toml'" in refused("run", "mine.toml")


def test_a_key_that_is_none_is_guessed(tmp_path: Path) -> None:
    assert "did you mean 'rounds'?" in refused("run", "roundz=3", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["run", "compare", "describe", "partition"])
def test_every_command_checks_the_settings_alike(command: str) -> None:
    assert "local.epochs" in refused(command, "quickstart", "local.epochs=some")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_data_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    said = refused(
        "run",
        *TINY,
        "data.source=table",
        f"data.path={tmp_path / 'data.jsonl'}",
        "data.private_facts=0",
        "--out",
        tmp_path / "x",
    )
    assert "data.jsonl" in said


def test_a_data_file_that_is_a_folder(tmp_path: Path) -> None:
    said = refused("partition", *TINY, "data.source=dolly", f"data.path={tmp_path}", "data.private_facts=0")
    assert str(tmp_path) in said


def test_a_data_file_that_is_not_there(tmp_path: Path) -> None:
    said = refused(
        "partition",
        *TINY,
        "data.source=dolly",
        f"data.path={tmp_path / 'gone.jsonl'}",
        "data.private_facts=0",
    )
    assert "gone.jsonl" in said


def test_a_data_source_without_a_path() -> None:
    assert "needs data.path" in refused("partition", "data.source=dolly", "data.private_facts=0")


@pytest.mark.parametrize("command", ["run", "describe"])
def test_a_model_that_is_nowhere(tmp_path: Path, command: str) -> None:
    out = ("--out", tmp_path / "x") if command == "run" else ()
    assert str(tmp_path / "llama") in refused(command, *TINY, f"model.base={tmp_path / 'llama'}", *out)


def test_more_clients_than_the_data_has_examples(tmp_path: Path) -> None:
    assert "clients" in refused("partition", *TINY, "data.clients=999")


def test_a_run_that_could_not_begin_may_be_started_over(tmp_path: Path) -> None:
    refused("run", *TINY, f"model.base={tmp_path / 'llama'}", "--out", tmp_path / "x")
    assert type_in("run", *TINY, "rounds=1", "evaluation.answers=0", "--out", tmp_path / "x").code == 0


def test_a_folder_that_holds_a_run(finished: Path) -> None:
    assert "already holds a run. Go on with it by --resume" in refused(
        "run", *TINY, "--out", finished
    ).replace("\n", " ")


def test_a_folder_in_use(finished: Path) -> None:
    with checkpoint.lock(finished):
        assert "in use by another process" in refused("run", "--resume", "--out", finished)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert "Nothing to resume" in refused("run", "--resume", "--out", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_resuming_without_saying_what() -> None:
    assert "--resume --out FOLDER" in refused("run", "--resume")


def test_resuming_with_other_settings(finished: Path) -> None:
    assert "of another training: rounds differs" in refused("run", finished, "rounds=9", "--resume")


def test_export_into_a_folder_that_exists(finished: Path, tmp_path: Path) -> None:
    assert "exists already and is left as it is" in refused("export", finished, "--out", tmp_path)


@pytest.mark.parametrize("command", ["chat", "export", "evaluate", "report"])
def test_a_run_that_is_not_finished(tmp_path: Path, command: str) -> None:
    (tmp_path / "experiment.toml").write_text(load("quickstart", TINY).to_toml())
    assert str(tmp_path) in refused(command, tmp_path)


@pytest.mark.parametrize("command", ["chat", "export", "evaluate", "report"])
def test_a_run_that_does_not_exist(tmp_path: Path, command: str) -> None:
    assert "nowhere" in refused(command, tmp_path / "nowhere")


def test_an_adapter_that_was_damaged(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("experiment.toml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (tmp_path / name).write_bytes(
            (finished / name).read_bytes()[: -9 if name.endswith("tensors") else None]
        )
    assert "adapter_model.safetensors is damaged" in refused("evaluate", tmp_path)


def test_copying_over_a_file(here: Path) -> None:
    (here / "quickstart.toml").write_text("mine")
    assert "exists already" in refused("copy", "quickstart")
    assert (here / "quickstart.toml").read_text() == "mine"


def test_copying_a_recipe_that_is_none() -> None:
    assert "Expected one of the recipes" in refused("copy", "nothing")


def test_training_that_diverges_is_said_with_advice(tmp_path: Path) -> None:
    wild = ["adapter.targets=all-linear", "local.learning_rate=1e30"]
    said = refused("run", *TINY, *wild, "--out", tmp_path / "x")
    assert "local.learning_rate" in said


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused("run", *TINY, "--out", tmp_path / "file" / "x")


def test_a_bug_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    done = type_in("run")
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert "This is a bug in fedloom, not a mistake of yours" in done.err


def test_an_option_that_is_none_is_typers_to_explain() -> None:
    done = type_in("run", "--fast")
    assert done.code == 2
    assert "No such option" in done.err
