"""What a user installs: the wheel and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

from fedloom.algorithms.names import ALGORITHMS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder,
            ROOT,
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = {
        f.relative_to(ROOT).as_posix()
        for f in (ROOT / "fedloom").rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    }
    assert package - set(wheel.namelist()) == set()


@pytest.mark.parametrize("needed", ["fedloom/recipes/quickstart.toml", "fedloom/embedded/model.safetensors"])
def test_the_wheel_holds_what_is_not_python(wheel, needed):
    assert wheel.getinfo(needed).file_size > 0


def test_the_wheel_holds_nothing_but_the_package(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "fedloom",
        f"fedloom-{PROJECT['version']}.dist-info",
    }


def test_the_embedded_model_fits_the_repository():
    assert sum(f.stat().st_size for f in (ROOT / "fedloom/embedded").iterdir()) < 32_000_000


def test_importing_the_package_loads_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import fedloom, sys; assert 'torch' not in sys.modules"], check=True
    )


def test_the_help_page_needs_no_torch():
    code = "import fedloom.cli.main, sys; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


HEAVY = {"torch", "transformers", "peft", "scipy", "sklearn", "plotly"}


@pytest.mark.parametrize("module", ["fedloom.experiment.toml", "fedloom.experiment.build"])
def test_settings_and_data_are_read_without_torch(module):
    code = f"""
        import sys
        from {module} import *
        from fedloom.experiment import build, datasets, toml
        its = toml.load("fedpit-microworld")
        its.with_(adapter={{"rank": 2}}, transport={{"codec": "int4"}}).fingerprint()
        datasets.load_data(its)
        assert not {HEAVY} & set(sys.modules), set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_server_half_of_an_algorithm_needs_no_tokenizer_and_no_base_model(name):
    code = f"""
        import sys
        import torch
        from fedloom.experiment.toml import parse
        from fedloom.messages import Update
        from fedloom.state import AdapterState
        algorithm = parse("", "x", ["algorithm={name}"]).algorithm
        def adapter(x):
            return AdapterState({{"q.lora_A.weight": torch.full((1, 3), x), "q.lora_B.weight": torch.full((2, 1), x)}})
        state = algorithm.init(adapter(0.5))
        sent = algorithm.broadcast(state, "a")
        states = {{"delta": adapter(0.1)}} if algorithm.shared else {{}}
        state = algorithm.server(state, [Update(c, states, 2.0, {{"own_loss": 1.0}}) for c in "ab"])
        assert state.round == 1
        odd = [m for m in sys.modules if m.split(".")[0] in {HEAVY - {"torch"}} or m.startswith("fedloom.engine")]
        assert not odd, odd
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_the_version_is_in_the_changelog():
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_everything_the_project_asks_for():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    asked = [
        *PROJECT["dependencies"],
        *(d for extra in PROJECT["optional-dependencies"].values() for d in extra),
    ]
    assert {d.split(">=")[0].lower() for d in asked} - pinned == set()
