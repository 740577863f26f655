"""What a new user types wrongly: a sentence that says what is there and what was meant, at once and without a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.cli import arguments
from fedloom.cli.progress import CompareDisplay, Screen
from fedloom.errors import ConfigError, RunError
from fedloom.experiment import commands, comparison
from fedloom.experiment.toml import load, parse, recipes
from fedloom.storage import folders
from tests.cli.test_cli import TINY, refused, type_in

HEAVY = {"torch", "transformers", "peft", "scipy", "sklearn", "plotly"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(folder: Path, *, rounds: int = 0, seeds: int | None = None, settings: tuple[str, ...] = ()) -> Path:
    """What an unfinished run of so many rounds leaves, or a comparison with so many finished seeds."""
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(load("quickstart", settings).to_toml())
    if seeds is None:
        (folder / "state").mkdir()
        (folder / "metrics.jsonl").write_text("".join(f'{{"round": {r}}}\n' for r in range(rounds + 1)))
    for seed in range(seeds or 0):
        (folder / f"seed-{seed}" / "federated").mkdir(parents=True)
        (folder / f"seed-{seed}" / "federated" / "metrics.jsonl").write_text('{"round": 0}\n')
        (folder / f"seed-{seed}" / "result.json").write_text("{}")
    return folder


# --- at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["run", "quikstart"],
        ["run", "quickstart", "roundz=2"],
        ["compare", "rounds=0"],
        ["run", "--fast"],
        ["chat", "nowhere"],
        ["evaluate", "nowhere"],
        ["judge", "nowhere"],
        ["audit", "nowhere"],
        ["export", "nowhere"],
        ["report", "nowhere"],
        ["run", "--resume", "--out", "nowhere"],
        ["run", "fedit-dolly", "data.path=nowhere.jsonl"],
        ["compare", "data.clients=999"],
        ["partition", "fedit-dolly"],
        ["copy", "quikstart"],
        ["compare", "machine.workers=0"],
        ["run", "name=../x"],
    ],
)
def test_a_mistake_is_told_without_torch(here: Path, words: list[str]) -> None:
    code = f"""
import sys
from fedloom.cli import main
sys.argv = ["fedloom", *{words!r}]
try:
    main.main()
except SystemExit as end:
    assert end.code == 2, end.code
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


def test_the_first_word_of_a_run_comes_before_torch(here: Path) -> None:
    code = """
import sys
from fedloom.cli import main
from fedloom.cli.progress import RunDisplay
def first(self, what): assert "torch" not in sys.modules; print(what); sys.exit(7)
RunDisplay.phase = first
sys.argv = ["fedloom", "run"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "loading the base model\n")


# --- folders ---------------------------------------------------------------------------------------------


def test_a_seed_of_a_comparison_is_told_to_be_one(here: Path) -> None:
    begin(here / "demo", seeds=1)
    for command in ("chat", "evaluate", "run", "report"):
        assert "'demo/seed-0' is a seed of the comparison demo" in refused(command, "demo/seed-0")


def test_a_part_of_a_run_is_told_to_be_one(here: Path) -> None:
    begin(here / "runs" / "mine", rounds=2)
    for part in ("runs/mine/state", "runs/mine/metrics.jsonl"):
        assert f"{part!r} is a part of the run runs/mine. Expected runs/mine." in refused("chat", part)


def test_other_things_than_runs_are_called_what_they_are(here: Path) -> None:
    (here / "plain").mkdir()
    (here / "mine.toml").write_text("rounds = 3")
    (here / "data.jsonl").write_text("{}")
    assert "'plain' is a folder, but no run" in refused("chat", "plain")
    assert "Run it first: fedloom run mine.toml" in refused("chat", "mine.toml")
    assert "'data.jsonl' is a file" in refused("chat", "data.jsonl")
    assert "'quickstart' is a recipe" in refused("chat", "quickstart")
    assert "data.jsonl is data" in refused("run", "data.jsonl")
    assert "data.path=data.jsonl" in refused("run", "data.jsonl")


def test_the_run_that_was_meant_is_named(here: Path) -> None:
    begin(here / "runs" / "quickstart-1")
    begin(here / "runs" / "other-1")
    assert "Did you mean runs/quickstart-1?" in refused("chat", "quickstrat-1")
    assert "Did you mean runs/quickstart-1?" in refused("chat", "quickstart")
    assert "'runs' is a folder that holds runs" in refused("chat", "runs")


@pytest.mark.parametrize("command", ["chat", "evaluate", "export", "report", "judge", "audit"])
def test_an_unfinished_run_is_told_with_the_command_that_goes_on(here: Path, command: str) -> None:
    begin(here / "a run", rounds=2)
    begin(here / "many", seeds=1)
    assert "2 of 6 rounds are done. Go on with it: fedloom run --resume --out 'a run'" in refused(
        command, "a run"
    )
    assert "1 of 5 seeds are done. Go on with it: fedloom compare --resume --out many" in refused(
        command, "many"
    )


@pytest.mark.parametrize("command", ["chat", "evaluate", "export", "report", "judge", "audit"])
def test_a_run_of_an_older_version_is_opened_by_every_command(here: Path, command: str) -> None:
    begin(here / "old", rounds=2)
    (here / "old" / "experiment.toml").write_text(
        'rounds = 6\n[model]\npath = "fast"\n[transport]\nwidth = 4\n'
    )
    assert "2 of 6 rounds are done" in refused(command, "old")


def test_a_name_that_no_disk_takes(here: Path) -> None:
    long = "a" * 300
    assert "There is no folder" in refused("chat", long)
    assert "File name too long" in refused("run", long)


@pytest.mark.parametrize(
    "name",
    ["../../x", "", "a/b", "a\\b", "..", ".hidden", "x.", "x ", " x", "-rf", "a" * 61, "a\0b", "a\nb", "x:y"],
)
def test_a_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: expected up to 60 letters|name holds"):
        load("quickstart").with_(name=name)


def test_two_methods_do_not_share_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"compare\.methods: expected names that differ .* a-b twice"):
        load("quickstart").with_(compare={"methods": {"A b": "fedavg", "a-b": "flexlora"}})


@pytest.mark.parametrize("name", ["x", "quickstart", "my run 2", "tâche", "a+b=c_d-e.f", "α1", "a" * 60])
def test_ordinary_names_are_names(name: str) -> None:
    assert load("quickstart").with_(name=name).name == name


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_run_that_could_not_begin_leaves_nothing(here: Path, command: str) -> None:
    refused(command, *TINY, f"model.base={here / 'llama'}")
    assert list(here.iterdir()) == []
    (here / "mine").mkdir()
    refused(command, *TINY, f"model.base={here / 'llama'}", "--out", "mine")
    assert (here / "mine").is_dir()


def test_what_was_quarantined_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, quarantine: Path, **__: object) -> None:
        quarantine.write_text("{}\n")
        raise ConfigError("no use")

    monkeypatch.setattr(commands, "load_data", fails)
    with pytest.raises(ConfigError):
        commands.run(load("quickstart", TINY), here / "x")
    assert (here / "x" / "quarantine.jsonl").exists()


def test_a_folder_that_somebody_else_works_in_is_not_taken_away(here: Path) -> None:
    from fedloom.storage import checkpoint

    with checkpoint.lock(here / "x"), pytest.raises(RunError, match="in use"):
        commands.run(load("quickstart", TINY), here / "x")
    assert (here / "x").is_dir()


def test_an_export_that_fails_leaves_no_half_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    begin(here / "run")
    monkeypatch.setattr(
        commands,
        "load_here",
        lambda _: (SimpleNamespace(base_sha256="", describe=lambda: {"conv1d": False}), None),
    )
    monkeypatch.setattr(commands, "adapter_of", lambda *_: None)
    monkeypatch.setattr(commands, "_save", half)
    with pytest.raises(OSError, match="No space"):
        commands.export(here / "run", here / "out", merged=False)
    assert [p.name for p in here.iterdir()] == ["run"]


# --- bytes -----------------------------------------------------------------------------------------------


def test_settings_that_are_no_text_are_said_plainly() -> None:
    for bad in ("data.path=caf\udce9", 'prompt.system="a\\u0000b"'):
        with pytest.raises(ConfigError, match="which is no text"):
            load("quickstart", [bad])
    assert "there is no 'caf\\udce9'" in refused("run", "caf\udce9")


def test_a_toml_file_of_an_old_editor_is_named_with_its_line(here: Path) -> None:
    (here / "old.toml").write_bytes(b'rounds = 2\nname = "caf\xe9"\n')
    assert "old.toml:2 is not UTF-8" in refused("run", "old.toml")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_a_letter_is_no_reason_to_stop(here: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedloom", "partition", "name=ⅷ", *TINY],
        capture_output=True,
        env={"PYTHONIOENCODING": f"{encoding}:strict", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"client-000" in done.stdout


def test_brackets_and_colons_are_printed_as_they_are(here: Path) -> None:
    out = here / "[bold]x[/y] :cat:"
    assert str(out) in type_in("copy", "quickstart", out / "x.toml").err.replace("\n", "")
    out.mkdir(parents=True)
    assert f"Wrote {out / 'x.toml'}" in type_in("copy", "quickstart", out / "x.toml").out


# --- finding one's way -----------------------------------------------------------------------------------


def test_the_version_is_told() -> None:
    done = type_in("--version")
    assert done.code == 0
    assert done.out.startswith("fedloom 0.")
    assert "torch" in done.out


def test_recipes_are_listed_with_what_they_take_and_need() -> None:
    from fedloom.cli.recipes import about

    said = type_in("recipes")
    assert said.code == 0
    for name, text in recipes().items():
        assert name in said.out
        assert all(about(text)), f"{name} lacks a line '# Takes: ...' or '# Needs: ...'"
        needs_nothing = parse(text, name).data.source == "microworld"
        assert (about(text)[2] == "nothing") == needs_nothing


def test_a_shell_completes_recipes_files_and_runs(here: Path) -> None:
    begin(here / "runs" / "quickstart-1")
    (here / "quick.toml").write_text("")
    (here / "quick.csv").write_text("")
    assert list(arguments.complete_what("quick")) == ["quickstart", "quick.toml"]
    assert list(arguments.complete_run("ru")) == ["runs/quickstart-1", "runs"]
    assert list(arguments.complete_run("runs/q")) == ["runs/quickstart-1"]


def test_describe_says_most_in_a_few_lines_and_all_if_asked(here: Path) -> None:
    short, whole = type_in("describe", *TINY), type_in("describe", *TINY, "--all")
    assert len(short.out.splitlines()) <= 14
    assert "learning_rate" not in short.out
    assert 'base = "random:llama"' in whole.out
    assert "fedloom describe quickstart model.base=random:llama" in short.out


def test_describe_fails_where_the_data_cannot_be_read_and_tells_the_rest(here: Path) -> None:
    done = type_in("describe", "fedit-dolly", *TINY[:4], "data.path=gone.jsonl")
    assert done.code == 2
    assert "gone.jsonl: no such file" in done.err
    assert done.err.count("fedloom: ") == 1
    assert all(word in done.out for word in ("could not be read", "parameters", "memory"))


# --- progress --------------------------------------------------------------------------------------------


def test_a_comparison_in_a_log_file_says_what_begins_and_little_more(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load("quickstart", ["rounds=50", "compare.seeds=1"])

    def seen(rounds: int, finished: int, doing: Mapping[int, comparison.Doing]) -> comparison.Progress:
        return comparison.Progress(rounds, 150, finished, doing)

    with Screen(here) as screen:
        display = CompareDisplay(experiment, screen)
        display.show(seen(0, 0, {}))
        display.show(seen(0, 0, {0: comparison.Doing()}))
        for row in ("local", "federated", "centralised"):
            for round in range(1, 51):
                display.show(seen(round, 0, {0: comparison.Doing("", {row: round}, 0.5)}))
        display.show(seen(150, 0, {0: comparison.Doing("answering 8 questions by 4 models")}))
        display.show(seen(150, 1, {}))
    assert capsys.readouterr().err.splitlines() == [
        f"quickstart: local-only, federated and centralised over 1 seed, in {here}",
        "loading the base model",
        "seed 0: loading the base model",
        "seed 0: training local (round 1 of 50)",
        "seed 0: training federated (round 1 of 50)",
        "seed 0: training centralised (round 1 of 50)",
        "seed 0: answering 8 questions by 4 models",
        "150 of 150 rounds · 1 of 1 seed done",
    ]


def test_an_interrupted_run_is_told_how_to_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(here / "begun", rounds=1)
    for place in ("begun", "not begun"):
        with pytest.raises(KeyboardInterrupt), Screen(Path(place)):
            raise KeyboardInterrupt
    assert (
        capsys.readouterr().err
        == "Every committed round is safe. Go on with it: fedloom run --resume --out begun\n"
    )


def test_the_kind_of_a_folder_is_read_from_its_files(here: Path) -> None:
    folders.expect_kind(here, "run")
    folders.expect_kind(here, "compare")
    with pytest.raises(RunError, match=r"holds a comparison\. Go on with it: fedloom compare"):
        folders.expect_kind(begin(here / "c", seeds=1), "run")
    with pytest.raises(RunError, match=r"holds a run\. Go on with it: fedloom run"):
        folders.expect_kind(begin(here / "r"), "compare")
