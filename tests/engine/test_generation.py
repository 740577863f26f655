from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_models import VOCABULARY, causal_lm, engine, llama, moved, shape

from fedloom.engine import generation
from fedloom.engine.bank import Tuning
from fedloom.engine.generation import generate_all, stream
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Generate, LoraSpec

# PEFT asks transformers by an old name, and corrects fan_in_fan_out itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

MODELS = {
    "llama": lambda: llama(initializer_range=0.2),
    "qwen2": lambda: causal_lm(transformers.Qwen2Config(**shape(initializer_range=0.2))),
    "qwen3": lambda: causal_lm(transformers.Qwen3Config(**shape(initializer_range=0.2, head_dim=8))),
    "gpt2": lambda: causal_lm(transformers.GPT2Config(**shape(initializer_range=0.2))),
    "gemma2": lambda: causal_lm(
        transformers.Gemma2Config(
            **shape(
                initializer_range=0.2,
                head_dim=8,
                sliding_window=7,
                attn_logit_softcapping=0.3,
                final_logit_softcapping=5.0,
            )
        )
    ),
    "gpt_neox": lambda: causal_lm(transformers.GPTNeoXConfig(**shape(initializer_range=0.2))),
    "phi3": lambda: causal_lm(transformers.Phi3Config(**shape(initializer_range=0.2))),
    "window": lambda: causal_lm(transformers.MistralConfig(**shape(initializer_range=0.2, sliding_window=7))),
    "opt": lambda: causal_lm(
        transformers.OPTConfig(**shape(init_std=0.2, word_embed_proj_dim=32, ffn_dim=48))
    ),
}
SPEC = LoraSpec(rank=4, alpha=8.0)


@cache
def served(name: str, path: str = "auto"):
    """A base, an engine over a copy of it, and three adapters."""
    base = MODELS[name]()
    lora_engine = engine(base, lora=SPEC, path=path)
    return base, lora_engine, [moved(lora_engine.layout, seed=seed) for seed in range(3)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to 30 tokens."""
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (count,), generator=numbers).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=numbers).tolist() for n in lengths]


def by_peft(base, adapter: AdapterState | None, prompt: list[int], new: int) -> list[int]:
    """transformers' own generate, one prompt alone, never stopping."""
    model = copy.deepcopy(base)
    if adapter is not None:
        names = sorted({name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in adapter})
        config = LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules=names, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        assert not set_peft_model_state_dict(model, dict(adapter)).unexpected_keys
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_of_mixed_adapters_are_those_of_peft_one_by_one(name, path):
    base, lora_engine, adapters = served(name, path)
    assert lora_engine.path == ("fast" if path == "auto" else path)
    states = {"base": None, "a": adapters[0], "b": adapters[1]}
    requests = {
        key: Generate(prompts(4, seed), state, max_new_tokens=12)
        for seed, (key, state) in enumerate(states.items())
    }
    expected = {
        key: [by_peft(base, states[key], prompt, 12) for prompt in request.prompts]
        for key, request in requests.items()
    }
    assert lora_engine.answer(requests) == expected
    assert len({str(answer) for answer in expected.values()}) == 3


def test_adapters_change_the_answer_to_the_same_prompt():
    _, lora_engine, adapters = served("llama")
    requests = {
        i: Generate(prompts(1), state, max_new_tokens=12) for i, state in enumerate([None, *adapters])
    }
    assert len({str(answer) for answer in generate_all(lora_engine.served, requests).values()}) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_neighbours(temperature, monkeypatch):
    _, lora_engine, adapters = served("llama")
    common = {"max_new_tokens": 10, "temperature": temperature}
    requests = {
        (i, j): Generate(prompts(3, seed=j), adapters[i], stream=(i, j), **common)
        for i in range(3)
        for j in range(2)
    }
    together = generate_all(lora_engine.served, requests)
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 1)
    assert generate_all(lora_engine.served, requests) == together


def test_limits_stops_and_temperatures_hold_row_by_row():
    _, lora_engine, adapters = served("llama")
    prompt = prompts(1)
    long = generate_all(lora_engine.served, {0: Generate(prompt, adapters[0], max_new_tokens=20)})[0][0]
    stop = frozenset({long[7]})
    requests = {
        "whole": Generate(prompt, adapters[0], max_new_tokens=20),
        "short": Generate(prompt, adapters[0], max_new_tokens=3),
        "stopped": Generate(prompt, adapters[0], max_new_tokens=20, stop=stop),
        "nothing": Generate(prompt, adapters[0], max_new_tokens=0),
        "warm": Generate(prompt, adapters[0], max_new_tokens=20, temperature=5.0),
    }
    answers = {key: answer[0] for key, answer in generate_all(lora_engine.served, requests).items()}
    assert answers["whole"] == long
    assert answers["short"] == long[:3]
    assert answers["stopped"] == long[: long.index(long[7])]
    assert answers["nothing"] == []
    assert answers["warm"] != long


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_when_finished_rows_leave_moves_no_answer(share, monkeypatch):
    _, lora_engine, adapters = served("window")
    requests = {n: Generate(prompts(2, seed=n), adapters[n % 3], max_new_tokens=3 * n) for n in range(6)}
    monkeypatch.setattr(generation, "LEAVE_SHARE", 0.5)
    expected = generate_all(lora_engine.served, requests)
    monkeypatch.setattr(generation, "LEAVE_SHARE", share)
    assert generate_all(lora_engine.served, requests) == expected


def test_answers_come_in_the_order_of_the_prompts():
    _, lora_engine, adapters = served("llama")
    asked = prompts(5)
    forward = generate_all(lora_engine.served, {0: Generate(asked, adapters[0], max_new_tokens=5)})[0]
    backward = generate_all(lora_engine.served, {0: Generate(asked[::-1], adapters[0], max_new_tokens=5)})[0]
    assert forward == backward[::-1]
    assert len({tuple(answer) for answer in forward}) > 1


def test_more_adapters_than_fit_side_by_side_are_answered_in_waves():
    _, lora_engine, _ = served("llama")
    adapters = [moved(lora_engine.layout, seed=seed) for seed in range(40)]  # 160 columns, 128 side by side
    requests = {i: Generate(prompts(1), state, max_new_tokens=4) for i, state in enumerate(adapters)}
    alone = {i: generate_all(lora_engine.served, {i: requests[i]})[i] for i in (0, 17, 39)}
    together = generate_all(lora_engine.served, requests)
    assert {i: together[i] for i in alone} == alone


def test_equal_adapters_share_one_row(monkeypatch):
    tuned = engine(llama()).served
    adapter = moved(tuned.layout)
    twin = AdapterState({name: tensor.clone() for name, tensor in adapter.items()})
    rows, real = [], tuned.rows

    def counted(adapters):
        rows.append(len(adapters))
        return real(adapters)

    monkeypatch.setattr(tuned, "rows", counted)
    answers = generate_all(
        tuned, {k: Generate([[3, 4, 5]], a, 8) for k, a in enumerate([adapter, twin, None])}
    )
    assert rows == [2]  # the adapter and the base
    assert answers[0] == answers[1] != answers[2]


def test_sampling_follows_the_models_probabilities():
    _, lora_engine, adapters = served("llama")
    [prompt] = prompts(1)
    with (
        lora_engine.served.rows({0: Tuning(adapters[0])}) as rows,
        rows.tokens(torch.zeros(1, len(prompt), dtype=torch.long)),
    ):
        expected = lora_engine.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    request = Generate([prompt] * 4000, adapters[0], max_new_tokens=1, temperature=1.0)
    drawn = torch.tensor(generate_all(lora_engine.served, {0: request})[0])[:, 0]
    seen = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    spread = (expected * (1 - expected) / 4000).sqrt()  # standard deviation of each share
    assert ((seen - expected).abs() <= 5 * spread + 1e-3).all()


def test_top_k_draws_among_the_k_likeliest_only_in_their_proportions():
    _, lora_engine, adapters = served("llama")
    [prompt] = prompts(1)
    with (
        lora_engine.served.rows({0: Tuning(adapters[0])}) as rows,
        rows.tokens(torch.zeros(1, len(prompt), dtype=torch.long)),
    ):
        logits = lora_engine.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    likeliest = logits.topk(3)
    hot = {"max_new_tokens": 1, "temperature": 2.0}
    requests = {k: Generate([prompt] * 2000, adapters[0], top_k=k, **hot) for k in (3, None)}
    drawn = {k: torch.tensor(said)[:, 0] for k, said in generate_all(lora_engine.served, requests).items()}
    expected = (likeliest.values / 2.0).softmax(-1)
    seen = torch.stack([(drawn[3] == token).double().mean() for token in likeliest.indices])
    assert seen.sum() == 1
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt()).all()
    assert len(drawn[None].unique()) > 3  # its neighbours in the batch draw among all


def test_sampling_has_a_random_number_for_every_prompt_step_and_stream():
    _, lora_engine, _ = served("llama")
    hot = {"max_new_tokens": 8, "temperature": 50.0}
    requests = {name: Generate([[5], [5]], None, stream=(name,), **hot) for name in ("x", "y")}
    answers = [
        tuple(answer) for both in generate_all(lora_engine.served, requests).values() for answer in both
    ]
    assert len(set(answers)) == 4
    assert all(len(set(answer)) > 4 for answer in answers)


def test_almost_no_temperature_is_greedy():
    _, lora_engine, adapters = served("llama")
    greedy = Generate(prompts(4), adapters[0], max_new_tokens=8)
    cool = Generate(prompts(4), adapters[0], max_new_tokens=8, temperature=1e-6)
    answers = generate_all(lora_engine.served, {"greedy": greedy, "cool": cool})
    assert answers["greedy"] == answers["cool"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_gives_the_tokens_of_the_whole_answer(temperature):
    _, lora_engine, adapters = served("gpt2")
    [prompt] = prompts(1)
    options = {"max_new_tokens": 15, "temperature": temperature}
    whole = generate_all(lora_engine.served, {0: Generate([prompt], adapters[0], **options)})[0][0]
    stop = frozenset({whole[9]})
    streamed = list(stream(lora_engine.served, prompt, adapters[0], stop=stop, seed=0, **options))
    assert streamed == whole[: whole.index(whole[9])]


def test_the_model_is_free_between_two_streamed_tokens():
    _, lora_engine, adapters = served("llama")
    [prompt] = prompts(1)
    ids = torch.tensor([prompt])
    untuned = lora_engine.model(input_ids=ids).logits
    tokens = stream(lora_engine.served, prompt, adapters[0], max_new_tokens=6)
    first = [next(tokens), next(tokens)]
    assert torch.is_grad_enabled()
    assert torch.equal(lora_engine.model(input_ids=ids).logits, untuned)
    other = generate_all(lora_engine.served, {0: Generate([prompt], adapters[1], max_new_tokens=6)})[0][0]
    assert (
        [*first, *tokens] == list(stream(lora_engine.served, prompt, adapters[0], max_new_tokens=6)) != other
    )


def test_an_answer_ends_with_the_models_positions():
    _, lora_engine, adapters = served("gpt2")  # 256 positions
    asked = [[7] * 250, [7] * 256]
    answers = generate_all(lora_engine.served, {0: Generate(asked, adapters[0], max_new_tokens=50)})[0]
    assert [len(answer) for answer in answers] == [7, 1]  # the last token needs no position


def test_a_prompt_longer_than_the_model_reads_is_refused_with_both_lengths():
    _, lora_engine, _ = served("gpt2")
    with pytest.raises(ModelError, match="has 257 tokens and the model reads 256"):
        generate_all(lora_engine.served, {"me": Generate([[7] * 257], max_new_tokens=1)})


def test_an_empty_prompt_is_refused():
    _, lora_engine, _ = served("gpt2")
    with pytest.raises(ModelError, match="Prompt 1 of 'me' is empty"):
        generate_all(lora_engine.served, {"me": Generate([[7], []])})


def test_no_prompts_have_no_answers():
    _, lora_engine, adapters = served("llama")
    assert generate_all(lora_engine.served, {0: Generate([], adapters[0])}) == {0: []}


def test_an_adapter_that_diverged_does_not_spoil_its_neighbours():
    _, lora_engine, adapters = served("llama")
    broken = adapters[1].map(lambda tensor: tensor * float("nan"))
    sound = Generate(prompts(2), adapters[0], max_new_tokens=6)
    alone = generate_all(lora_engine.served, {"sound": sound})["sound"]
    both = generate_all(
        lora_engine.served, {"broken": Generate(prompts(2), broken, max_new_tokens=6), "sound": sound}
    )
    assert both["sound"] == alone
    assert [len(answer) for answer in both["broken"]] == [6, 6]


def test_without_memory_for_a_batch_its_halves_are_answered(monkeypatch):
    _, lora_engine, adapters = served("llama")
    request = {0: Generate(prompts(7), adapters[0], max_new_tokens=6)}
    expected = generate_all(lora_engine.served, request)
    enough = generation.decoding

    def scarce(engine, rows, prompts, owners, **more):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("fake")
        return enough(engine, rows, prompts, owners, **more)

    monkeypatch.setattr(generation, "decoding", scarce)
    assert generate_all(lora_engine.served, request) == expected


def test_without_memory_for_one_prompt_the_error_says_so(monkeypatch):
    _, lora_engine, _ = served("llama")

    def none(*given, **more):
        raise torch.OutOfMemoryError("fake")

    monkeypatch.setattr(generation, "decoding", none)
    with pytest.raises(ModelError, match="one prompt of 3 tokens"):
        generate_all(lora_engine.served, {0: Generate([[5, 6, 7]])})
