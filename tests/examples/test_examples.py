"""The examples run, and the one without the library agrees with it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.data.template import Template
from fedloom.engine.lora_engine import LoraEngine
from fedloom.federation import Federation
from fedloom.selection import Uniform
from fedloom.state import AdapterState
from fedloom.steps import LocalTraining, LoraSpec
from fedloom.transport.in_process import Simulation

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--examples=48", "--held_out=8", "--clients=4", "--cohort=2", "--rounds=3", "--epochs=2", "--rank=4"]


def by_hand(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """Everything the flat script has in its hands when it ends."""
    monkeypatch.setattr(sys, "argv", ["01_fedit_from_scratch.py", *TINY, *flags])
    return runpy.run_path(str(EXAMPLES / "01_fedit_from_scratch.py"))


def with_the_library(script: dict[str, Any], dtype: torch.dtype) -> AdapterState:
    """The same clients, cohorts, rounds and settings."""
    settings = script["settings"]
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    model = AutoModelForCausalLM.from_pretrained(settings.base, dtype=dtype)
    template = Template(tokenizer, format="plain")
    engine = LoraEngine.build(
        model,
        template.encode,
        lora=LoraSpec(rank=settings.rank, alpha=2 * settings.rank),
    )
    local = LocalTraining(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate
    )
    clients = {c: Client(c, own, local=local, seed=settings.seed) for c, own in script["clients"].items()}
    algorithm = FedAvg()
    select = partial(Uniform(settings.cohort), sorted(clients), settings.seed)
    federation = Federation(algorithm, Simulation(algorithm, engine, clients), select)
    start = algorithm.init(engine.initial_adapter(settings.seed).to(dtype))
    return federation.run(start, settings.rounds).adapter


def difference(script: dict[str, Any], library: AdapterState) -> float:
    """Norm of the difference, relative to the norm of the adapter."""
    mine = AdapterState({name.replace(".default", ""): t for name, t in script["adapter"].items()})
    return (mine - library).norm() / library.norm()


def test_the_flat_script_and_the_library_end_in_the_same_adapter(monkeypatch, capsys):
    script = by_hand(monkeypatch, "--dtype=float64")
    assert difference(script, with_the_library(script, torch.float64)) < 1e-9


def test_a_client_more_or_less_is_not_the_same_adapter(monkeypatch, capsys):
    script = by_hand(monkeypatch, "--dtype=float64")
    script["settings"].cohort += 1
    assert difference(script, with_the_library(script, torch.float64)) > 1e-3


def test_the_python_api_example_runs(tmp_path):
    shorter = [
        "rounds=1",
        "data.examples=48",
        "data.hold_out=2",
        "data.clients=4",
        "local.epochs=1",
        "adapter.rank=2",
    ]
    shorter += [
        "compare.seeds=2",
        "compare.local_clients=1",
        "evaluation.answers=4",
        "evaluation.max_new_tokens=4",
    ]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "02_python_api.py", tmp_path, *shorter], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "federated - local best, loss:" in done.stdout
