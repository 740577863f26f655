"""The process that runs vLLM for vllm_backend.py: a line of JSON in, a line out.

It is run as a file and imports nothing but vLLM, whose environment may differ from fedloom's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any


def serve(options: Mapping[str, Any]) -> None:
    """Answer every line of standard input, until it ends; `options` are those of `vllm.LLM`."""
    # Only answers may go to standard output; vLLM and its own processes write what they like to it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    if find_spec("vllm") is None:
        answer({"error": f"the package vllm is missing: {sys.executable} -m pip install vllm"})
        return
    try:
        import vllm
        from vllm.lora.request import LoRARequest

        llm = vllm.LLM(enable_lora=True, **options)
        for line in sys.stdin:
            answer({"tokens": _tokens(vllm, LoRARequest, llm, json.loads(line))})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def _tokens(vllm: Any, adapter: Any, llm: Any, prompts: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for tuned in (False, True):  # a list of adapters has one for every prompt
        places = [i for i, prompt in enumerate(prompts) if (prompt["adapter"] is not None) == tuned]
        if not places:
            continue
        mine = [prompts[i] for i in places]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in mine],
            [
                vllm.SamplingParams(
                    temperature=prompt["temperature"],
                    top_k=prompt["top_k"] or -1,
                    seed=prompt["seed"],
                    max_tokens=prompt["max_tokens"],
                    stop_token_ids=prompt["stop"],
                    ignore_eos=True,  # what ends an answer is what was asked for
                    detokenize=False,
                )
                for prompt in mine
            ],
            use_tqdm=False,
            lora_request=[adapter(f"adapter-{p['adapter'][0]}", *p["adapter"]) for p in mine]
            if tuned
            else None,
        )
        for place, output in zip(places, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            if tokens and tokens[-1] in prompts[place]["stop"]:
                tokens.pop()
            found[place] = tokens
    return found


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose other names are not for vLLM to find
    serve(json.loads(sys.argv[1]))
