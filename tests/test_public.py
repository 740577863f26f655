"""What `import fedloom` offers."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import fedloom
from fedloom.errors import FedloomError

PUBLIC = {"FedloomError", "audit", "chat", "compare", "evaluate", "export", "judge", "load", "recipes", "run"}


def test_the_public_surface_is_exactly_this() -> None:
    assert set(fedloom.__all__) == {*PUBLIC, "__version__"} == set(dir(fedloom))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_explains_itself(name: str) -> None:
    assert getattr(fedloom, name).__doc__


def test_nothing_else_leaks_but_the_package_s_own_modules() -> None:
    shown = {name for name in vars(fedloom) if not name.startswith("_")}
    modules = {name for name in shown if isinstance(getattr(fedloom, name), ModuleType)}
    assert shown - modules <= PUBLIC
    assert all(getattr(fedloom, name).__name__ == f"fedloom.{name}" for name in modules)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        fedloom.trainer  # noqa: B018


def test_every_error_can_be_caught_by_the_public_base() -> None:
    assert fedloom.FedloomError is FedloomError
    with pytest.raises(fedloom.FedloomError):
        fedloom.load("no such recipe")


def test_loading_an_experiment_needs_no_torch() -> None:
    code = "import sys, fedloom; fedloom.load('quickstart'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert fedloom.__version__.count(".") == 2
