"""What the documents say is so.

Every ```python block runs, those of one page in order and in one namespace. Every line `$ fedloom ...`
of a ```console block parses, and so do its settings; so does every ```toml block. Every link to a file of
the project leads somewhere. Other blocks (```text) are only read.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from fedloom.cli.arguments import first_is_override
from fedloom.cli.main import app
from fedloom.experiment import toml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def typed(page: Path) -> list[str]:
    """What a reader is shown to type; a line that ends in a backslash goes on."""
    lines = "\n".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines if line.startswith("$ ")]


def in_recipes() -> list[str]:
    """The same, of the comments in the shipped recipes."""
    lines = "\n".join(toml.recipes().values()).splitlines()
    return [line.lstrip("# ").strip() for line in lines if re.match(r"#\s+fedloom ", line)]


TYPED = sorted({line for page in PAGES for line in typed(page)} | set(in_recipes()))


def check_command(line: str) -> None:
    program, *words = shlex.split(line)
    match program:
        case "fedloom" if words[0] == "--help":
            pass
        case "fedloom":
            given = (
                COMMANDS[words[0]].make_context(words[0], words[1:]).params
            )  # exits where it does not parse
            if "what" in given:
                what, overrides = first_is_override(given["what"], given["overrides"])
                text = toml.recipes().get(what, "")  # the reader's own file: only the settings are checked
                toml.parse(text, what, overrides)
            elif given.get("overrides"):
                toml.parse("", "a run", given["overrides"])
            if "recipe" in given:
                assert given["recipe"] in toml.recipes()
        case "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
            for extra in re.findall(r"\[(\w+)\]", line):
                assert extra in project["optional-dependencies"]
        case "python" | "bash":
            assert (ROOT / words[0]).is_file()
        case "git" | "cd" | "tensorboard":
            pass
        case _:
            pytest.fail(f"unknown program {program!r}")


@pytest.mark.parametrize("line", TYPED)
def test_a_command_in_the_documents_can_be_typed(line):
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "fedloom run quikstart rouns=2",
        "fedloom run --outt x",
        "fedloom copy nothing",
        "pip install fedloom[no]",
    ],
)
def test_a_wrong_command_would_be_noticed(line):
    with pytest.raises((Exception, SystemExit)):
        check_command(line)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=lambda p: p.name)
def test_the_settings_of_a_page_are_valid(page):
    for text in blocks(page, "toml"):
        toml.parse(text, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    missing = [link for link, _ in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert missing == []


def test_the_tree_in_the_architecture_page_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = subprocess.run(
        ["git", "ls-files", "fedloom/*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {Path(line).name for line in listed.stdout.splitlines()} - {"__init__.py", "__main__.py"}
    assert sorted(name for name in modules if name not in text) == []


def test_the_page_of_commands_says_what_the_command_line_says():
    page = runpy.run_path(str(ROOT / "scripts/cli_docs.py"))["page"]
    assert (ROOT / "docs/cli.md").read_text("utf-8") == page(), "run: python scripts/cli_docs.py"
