"""Generation by vLLM in a process of its own, started at the first request: `VllmGeneration`.

vLLM takes most of a GPU for itself and needs its own versions of torch and transformers, so its process may run in
another environment, where fedloom need not be installed. Requests and answers are lines of JSON (vllm_process.py);
adapters are folders in PEFT's format.

Answers differ from the engine's own: greedy ones come from vLLM's kernels, in their precision; sampled ones repeat
too, but draw other tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from fedloom import lora, rng
from fedloom.engine import vllm_process
from fedloom.engine.peft_format import save_adapter
from fedloom.engine.serving import ServedModel
from fedloom.errors import ModelError
from fedloom.steps import Generate, LoraSpec

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
TOGETHER = 8  # adapters in one batch


class VllmGeneration:
    """Answers Generate in `LoraEngine`'s stead, for the base model in the folder `base`; `close` it at the end.

    `python` is the interpreter of the environment that has vLLM. `options` go to `vllm.LLM`
    (`gpu_memory_utilization`, `max_model_len`). Raises ModelError where vLLM is not installed, fails, or
    would not do exactly what is asked.
    """

    def __init__(self, base: str | Path, *, python: str | Path = sys.executable, **options: Any):
        self._base = str(base)
        self._python = str(python)
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self._known: dict[str, int] = {}  # `_name` of an adapter that is on disk -> its number
        self._count = 0  # of numbers given; vLLM keeps an adapter by its number, so none is given twice

    def __call__(
        self, served: ServedModel, requests: Mapping[Hashable, Generate]
    ) -> dict[Hashable, list[list[int]]]:
        self._forget({_name(request) for request in requests.values()})
        prompts: list[dict[str, Any]] = []
        for key, request in requests.items():
            if request.repetition_penalty != 1:
                raise ModelError(
                    "vLLM's repetition penalty counts the prompt's tokens too; set it to 1, or generate without vLLM."
                )
            if request.frozen is not None:
                raise ModelError("vLLM serves no frozen factors under an adapter; generate without vLLM.")
            adapter = self._exported(served.layout.spec, request)
            for index, ids in enumerate(request.prompts):
                if not len(ids):
                    raise ModelError(
                        f"Prompt {index} of {key!r} is empty; a model continues one token at least."
                    )
                name = rng.key(request.seed, "sample", *request.stream, index)
                prompts.append(
                    {
                        "ids": list(ids),
                        "adapter": adapter,
                        "max_tokens": request.max_new_tokens,
                        "stop": sorted(request.stop),
                        "temperature": request.temperature,
                        "top_k": request.top_k,
                        "seed": name % 2**31,
                    }
                )
        asked = [prompt for prompt in prompts if prompt["max_tokens"] > 0]
        answers = iter(self._asked(served, asked) if asked else [])
        return {
            key: [next(answers) if request.max_new_tokens > 0 else [] for _ in request.prompts]
            for key, request in requests.items()
        }

    def close(self) -> None:
        """End the process and remove the adapters written for it."""
        if self._process is not None:
            self._process.communicate()  # closes its input, at whose end it leaves
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._known.clear()

    def _forget(self, wanted: set[str]) -> None:
        """Remove all other adapters from disk: every round brings new ones."""
        for name in self._known.keys() - wanted:
            assert self._folder is not None
            rmtree(Path(self._folder.name) / name)
            del self._known[name]

    def _exported(self, spec: LoraSpec, request: Generate) -> tuple[int, str] | None:
        """The number and folder of an adapter, written when it is new."""
        if request.adapter is None:
            return None
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="fedloom-")
        name = _name(request)
        folder = Path(self._folder.name) / name
        if name not in self._known:
            self._count += 1
            self._known[name] = self._count
            rank = max(pair.rank for pair in lora.pairs(request.adapter).values())
            scale = spec.scale if request.scale is None else request.scale
            plain = replace(spec, rank=rank, alpha=scale * rank, rslora=False)
            save_adapter(folder, request.adapter, plain, base_name=self._base, card="For vLLM.")
        return self._known[name], str(folder)

    def _asked(self, served: ServedModel, prompts: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        if self._process is None:
            self._process = self._started(served.layout.spec.rank)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(prompts) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said last, if anything, is read below
        line = process.stdout.readline()
        ended = {"error": "it ended without an answer; its own words are above"}
        answer: dict[str, Any] = json.loads(line) if line else ended
        if "error" in answer:
            self.close()
            raise ModelError(f"vLLM could not generate: {answer['error']}.")
        return answer["tokens"]

    def _started(self, rank: int) -> subprocess.Popen[str]:
        if rank > RANKS[-1]:
            raise ModelError(f"vLLM serves adapters up to rank {RANKS[-1]}, this one has {rank}.")
        options = {
            "max_lora_rank": min(r for r in RANKS if r >= rank),
            "max_loras": TOGETHER,
            **self._options,
        }
        command = [self._python, vllm_process.__file__, json.dumps({"model": self._base, **options})]
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ModelError(
                f"vLLM was to run under {self._python}, which could not be started ({error.strerror}). "
                "Expected the python of an environment that has vLLM."
            ) from error


def _name(request: Generate) -> str:
    """Names an adapter at its scale."""
    if request.adapter is None:
        return ""
    return request.adapter.sha256() + ("" if request.scale is None else f"-{request.scale!r}")
