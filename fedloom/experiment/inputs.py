"""Hashes of everything besides the settings that an adapter depends on: data, base model, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedloom.experiment.datasets import Dataset
from fedloom.experiment.machine import Machine
from fedloom.experiment.training import WHAT


def inputs_of(dataset: Dataset, machine: Machine) -> Mapping[str, str]:
    return {
        "data_sha256": dataset.sha256(),
        "base_sha256": machine.base_sha256,
        "prompt_sha256": machine.template.sha256(),
    }


def other_inputs(saved: Path, dataset: Dataset, machine: Machine) -> str | None:
    """The first input that differs from `saved` (a training's inputs.json): "data are", say; else None.

    Raises: OSError, ValueError.
    """
    now = inputs_of(dataset, machine)
    then = {
        "prompt_sha256": now["prompt_sha256"],
        **json.loads(saved.read_bytes()),
    }  # 0.1.0 did not record the prompts
    odd = [key for key in WHAT if then.get(key) != now[key]]
    if "base_sha256" in odd and machine.is_base(then.get("base_sha256", "")):
        odd.remove("base_sha256")
    return WHAT[odd[0]] if odd else None
