"""The files beside exported weights, with which other tools prompt and stop as in training.

tokenizer.json ...        the tokenizer, with a chat template that gives the trained prompts
generation_config.json    every token that ends an answer; greedy, as answers are measured
fedloom.json              the same in short, and which base model the weights belong to
"""

from __future__ import annotations

import json
from collections.abc import Set
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig

from fedloom.engine.peft_format import replace_file

RECORD = "fedloom.json"


@dataclass(frozen=True)
class ExportFiles:
    tokenizer: Any
    chat_template: str
    stop: Set[int]  # each ends an answer
    format: str
    system: str
    base_sha256: str

    def save(self, folder: Path) -> None:
        """Write each file whole or not at all; other files in `folder` stay."""
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = self.chat_template
        generation = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(self.stop),
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        record = {
            "base_sha256": self.base_sha256,
            "format": self.format,
            "system": self.system,
            "stop": sorted(self.stop),
        }
        with TemporaryDirectory() as draft:
            tokenizer.save_pretrained(draft)
            generation.save_pretrained(draft)
            for file in sorted(Path(draft).iterdir()):
                replace_file(folder / file.name, file.read_bytes())
        replace_file(folder / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def recorded_base(folder: Path) -> str | None:
    """The base model's sha256 that `save` wrote there; None: nothing did."""
    try:
        said = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = said.get("base_sha256") if isinstance(said, dict) else None
    return found if isinstance(found, str) else None
