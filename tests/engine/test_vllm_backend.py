"""The process that runs vLLM, with a module in vLLM's place whose answers tell what it was asked."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from tiny_models import LOCAL, engine, examples, llama, moved

from fedloom.engine.layout import AdapterLayout
from fedloom.engine.peft_format import load_adapter
from fedloom.engine.vllm_backend import VllmGeneration
from fedloom.errors import ConfigError, ModelError
from fedloom.experiment.machine import load_machine
from fedloom.experiment.toml import load
from fedloom.state import AdapterState
from fedloom.steps import Fit, Frozen, Generate, LoraSpec

FAKE = """
    from types import SimpleNamespace

    class SamplingParams:
        def __init__(self, **options):
            assert options["ignore_eos"] and not options["detokenize"]
            self.__dict__.update(options)

    class LLM:
        def __init__(self, *, model, enable_lora, max_lora_rank, max_loras):
            assert (model, enable_lora, max_lora_rank) == ("a/base", True, 8), max_lora_rank
            print("vLLM says whatever it likes")

        def generate(self, prompts, params, *, use_tqdm, lora_request):
            if any(13 in prompt["prompt_token_ids"] for prompt in prompts):
                raise ValueError("thirteen")
            found = []
            for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
                said = 100 + (lora_request[i].lora_int_id if lora_request else 0)
                tokens = [said, asked.top_k, *prompt["prompt_token_ids"]][: asked.max_tokens]
                ends = [n for n, token in enumerate(tokens) if token in asked.stop_token_ids]
                tokens = tokens[: ends[0] + 1] if ends else tokens
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))]))
                if lora_request:
                    open(lora_request[i].lora_path + "/adapter_config.json").close()
            return found
"""
REQUEST = """
    class LoRARequest:
        def __init__(self, lora_name, lora_int_id, lora_path):
            self.lora_int_id, self.lora_path = lora_int_id, lora_path
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    for name, text in {"__init__": FAKE, "lora/__init__": "", "lora/request": REQUEST}.items():
        file = tmp_path / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def backend():
    generation = VllmGeneration("a/base")
    yield generation
    generation.close()


def test_prompts_reach_vllm_with_their_adapters_and_come_back_in_order(vllm, backend):
    served = engine(llama())
    one, other = moved(served.layout, seed=1), moved(served.layout, seed=2)
    requests = {
        "base": Generate([[3, 4], [5]], None, 9),
        "one": Generate([[6]], one, 9, top_k=7),
        "other": Generate([[8, 9, 10], [9]], other, 4, stop=frozenset({9})),
        "nothing": Generate([[3]], one, 0),
    }
    assert backend(served, requests) == {
        "base": [[100, -1, 3, 4], [100, -1, 5]],
        "one": [[101, 7, 6]],
        "other": [[102, -1, 8], [102, -1]],
        "nothing": [[]],
    }
    process, folder = backend._process, Path(backend._folder.name)
    written = [load_adapter(adapter)[0].sha256() for adapter in sorted(folder.iterdir())]
    assert written == sorted([one.sha256(), other.sha256()])
    again = {"again": Generate([[3]], other, 9)}
    assert backend(served, again) == {"again": [[102, -1, 3]]}
    assert backend._process is process
    assert [adapter.name for adapter in folder.iterdir()] == [other.sha256()]
    again = {"again": Generate([[3]], one, 9)}
    assert backend(served, again) == {"again": [[103, -1, 3]]}  # vLLM knows another adapter by 101
    backend.close()
    assert process.returncode == 0
    assert not folder.exists()


def test_an_adapter_of_lower_rank_and_other_scale_is_exported_as_it_is(vllm, backend):
    served = engine(llama())  # of rank 4
    adapter = moved(AdapterLayout.of(llama(), LoraSpec(rank=2)))
    backend(served, {0: Generate([[6]], adapter, 2, scale=3.0), 1: Generate([[6]], adapter, 2)})
    specs = [load_adapter(folder)[1] for folder in Path(backend._folder.name).iterdir()]
    assert {spec.rank for spec in specs} == {2}
    assert {spec.scale for spec in specs} == {3.0, served.layout.spec.scale}


def test_what_vllm_raises_is_told_and_the_next_request_starts_anew(vllm, backend):
    served = engine(llama())
    with pytest.raises(ModelError, match="ValueError: thirteen"):
        backend(served, {0: Generate([[13]])})
    assert backend(served, {0: Generate([[3]], None, 2)}) == {0: [[100, -1]]}


def test_without_vllm_the_error_says_what_to_install(backend):
    with pytest.raises(ModelError, match=r"package vllm is missing: .* -m pip install vllm"):
        backend(engine(llama()), {0: Generate([[3]])})


def test_what_vllm_understands_otherwise_is_refused(backend):
    with pytest.raises(ModelError, match="counts the prompt's tokens too"):
        backend(engine(llama()), {0: Generate([[3]], repetition_penalty=1.1)})
    with pytest.raises(ModelError, match="Prompt 1 of 'me' is empty"):
        backend(engine(llama()), {"me": Generate([[3], []])})
    with pytest.raises(ModelError, match="no frozen factors"):
        backend(engine(llama()), {0: Generate([[3]], frozen=Frozen(AdapterState({})))})


def test_an_engine_asks_it_for_answers_and_trains_by_itself(vllm, backend):
    served = engine(llama(), generation=backend)
    adapter = moved(served.layout)
    answers = served.answer(
        {"asked": Generate([[3, 4]], adapter, 4), "fit": Fit(adapter, examples(2), LOCAL)}
    )
    assert answers["asked"] == [[101, -1, 3, 4]]
    assert answers["fit"].steps == 1


def test_an_experiment_asks_for_it_by_its_interpreter_and_with_a_model_on_disk():
    asked = ["machine.vllm.python=elsewhere/bin/python", "rounds=1"]
    machine = load_machine(load("quickstart", asked))
    with pytest.raises(ModelError, match="elsewhere/bin/python"):
        machine.engine.answer({0: Generate([[3, 4]], None, 4)})
    with pytest.raises(ConfigError, match=r"on disk; got model.base='random:llama'"):
        load_machine(load("quickstart", [*asked, "model.base=random:llama"]))
