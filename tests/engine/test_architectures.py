"""Every architecture trains as plain PEFT trains it: on the fast path, or by falling back with a reason."""

from __future__ import annotations

from functools import partial

import pytest
import transformers as T
from tiny_models import causal_lm, distance, engine, examples, moved, shape

from fedloom.errors import ModelError
from fedloom.steps import Fit, LocalTraining, LoraSpec, Score

SGD = LocalTraining(batch_size=4, learning_rate=1.0, optimizer="sgd", clip=0.0)
SMALL = {
    "vocab_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}

FAST = {
    "llama": partial(T.LlamaConfig, **shape()),
    "qwen2": partial(T.Qwen2Config, **shape()),
    "qwen2 with a window in one layer": partial(
        T.Qwen2Config, **shape(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": partial(T.Qwen3Config, **shape(**HEADS)),
    "mistral": partial(T.MistralConfig, **shape(sliding_window=None)),
    "mistral with a window": partial(T.MistralConfig, **shape(sliding_window=6)),
    "gpt2": partial(
        T.GPT2Config, vocab_size=120, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gemma": partial(T.GemmaConfig, **shape(**HEADS)),
    "gemma2 with softcaps": partial(
        T.Gemma2Config, **shape(**HEADS, attn_logit_softcapping=0.02, final_logit_softcapping=0.1)
    ),
    "gemma2 with a window": partial(T.Gemma2Config, **shape(**HEADS, sliding_window=6)),
    "gpt_neox": partial(T.GPTNeoXConfig, **SMALL, intermediate_size=48),
    "opt": partial(T.OPTConfig, **SMALL, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
    "phi": partial(T.PhiConfig, **shape()),
    "phi3": partial(T.Phi3Config, **shape()),
    "cohere with a logit scale": partial(T.CohereConfig, **shape(logit_scale=0.3)),
    "granite with its multipliers": partial(
        T.GraniteConfig,
        **shape(
            logits_scaling=3.0, attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5
        ),
    ),
    "olmo2": partial(T.Olmo2Config, **shape()),
    "mixtral": partial(T.MixtralConfig, **shape(num_local_experts=4)),
}

SLOW = {
    "gpt_oss": (partial(T.GptOssConfig, **shape(num_local_experts=4, **HEADS)), "s_aux"),
    "bloom": (partial(T.BloomConfig, vocab_size=120, hidden_size=32, n_layer=2, n_head=4), "interface"),
    "gpt_neo": (
        partial(
            T.GPTNeoConfig,
            vocab_size=120,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        ),
        "interface",
    ),
    "llama with dynamic rope": (
        partial(T.LlamaConfig, **shape(rope_parameters={"rope_type": "dynamic", "factor": 2.0})),
        "dynamic rope",
    ),
    "lfm2 with convolutions": (
        partial(T.Lfm2Config, **shape(layer_types=["conv", "full_attention"])),
        "layers of type conv",
    ),
}


def trained_and_scored(model, path):
    one = engine(model, path=path)
    jobs = {k: Fit(moved(one.layout, seed=k), examples(3 + 2 * k, k), SGD, stream=(k,)) for k in range(2)}
    scores = {"scores": Score(examples(3), jobs[1].adapter), "base": Score(examples(3))}
    return one, jobs, one.answer({**jobs, **scores})


@pytest.mark.parametrize("name", FAST)
def test_fast_path_trains_as_plain_peft(name):
    model = causal_lm(FAST[name]())
    _, jobs, fast = trained_and_scored(model, "fast")
    _, _, slow = trained_and_scored(model, "reference")
    for key, job in jobs.items():
        moved_by = distance(slow[key].adapter, job.adapter)
        assert moved_by > 1e-4
        assert distance(fast[key].adapter, slow[key].adapter) < 1e-6 + 2e-4 * moved_by
        assert fast[key].loss == pytest.approx(slow[key].loss, rel=1e-5)
    for key in ("scores", "base"):
        assert [s.nll for s in fast[key]] == pytest.approx([s.nll for s in slow[key]], rel=1e-5)


@pytest.mark.parametrize("name", SLOW)
def test_what_the_fast_path_cannot_do_falls_back_and_says_why(name):
    config, reason = SLOW[name]
    one, jobs, answers = trained_and_scored(causal_lm(config()), "auto")
    assert one.path == "reference"
    assert reason in one.path_reason
    assert all(answers[key].adapter.is_finite() and answers[key].steps == 1 + key for key in jobs)


def test_an_encoder_decoder_is_refused():
    config = T.T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        engine(T.T5ForConditionalGeneration(config))


def test_targets_that_peft_refuses_are_refused_by_us():
    config = T.MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ModelError, match="PEFT cannot adapt"):
        engine(causal_lm(config), lora=LoraSpec(targets=("out_proj",)))
