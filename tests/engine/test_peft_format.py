from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, engine, llama, moved, shape
from tokenizers import Tokenizer, models

from fedloom.engine.bank import Tuning
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.peft_format import CONFIG, WEIGHTS, export_merged, load_adapter, save_adapter
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import LoraSpec

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS = {
    "llama": lambda: llama(),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: _build(transformers.Qwen2Config),
    "gpt2": lambda: _build(transformers.GPT2Config),
}
SPECS = {
    "plain": LoraSpec(rank=4, alpha=8.0),
    "rslora": LoraSpec(rank=4, alpha=6.5, rslora=True, dropout=0.1),
}
IDS = torch.arange(3, 40)[None]


def _build(kind):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**shape())).eval()


def answers(lora_engine, adapter) -> torch.Tensor:
    """Logits of the engine's model under an adapter."""
    with lora_engine.served.rows({"a": Tuning(adapter)}) as rows, rows.tokens(torch.zeros_like(IDS)):
        return lora_engine.model(input_ids=IDS).logits


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", unk_token="0")


@pytest.fixture(params=[f"{model}-{spec}" for model in MODELS for spec in SPECS])
def case(request):
    """A base model, an engine over it, an adapter, and the engine's logits under it."""
    name, _, spec = request.param.rpartition("-")
    base = MODELS[name]()
    lora_engine = engine(base, lora=SPECS[spec])
    adapter = moved(lora_engine.layout)
    return base, lora_engine, adapter, answers(lora_engine, adapter)


def save(folder, lora_engine, adapter, base_name="some/base", **options) -> None:
    conv1d = any(target.kind == "conv1d" for target in lora_engine.layout)
    spec = lora_engine.layout.spec
    save_adapter(
        folder, adapter, spec, base_name=base_name, card="# A card", fan_in_fan_out=conv1d, **options
    )


def test_peft_gives_the_engines_logits_with_our_file(case, tmp_path):
    base, lora_engine, adapter, ours = case
    save(tmp_path, lora_engine, adapter)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(input_ids=IDS).logits
        untuned = base(input_ids=IDS).logits
    assert (ours - theirs).abs().max() <= 1e-5 < 0.05 < (ours - untuned).abs().max()


def test_a_merged_export_gives_the_engines_logits_in_plain_transformers(case, tmp_path):
    _, lora_engine, adapter, ours = case
    export_merged(lora_engine.model, tokenizer(), adapter, lora_engine.layout, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", use_safetensors=True)
    assert (ours - merged(input_ids=IDS).logits).abs().max() <= 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "2"
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "merged").iterdir())


def test_an_adapter_survives_saving_to_the_bit(case, tmp_path):
    _, lora_engine, adapter, _ = case
    save(tmp_path, lora_engine, adapter)
    state, spec = load_adapter(tmp_path)
    assert state.sha256() == adapter.sha256()
    assert AdapterLayout.of(
        MODELS["llama"]() if "q_proj" in str(list(state)) else MODELS["gpt2"](), spec
    ).size == (lora_engine.layout.size)
    assert (spec.rank, spec.alpha, spec.dropout, spec.rslora) == (
        lora_engine.layout.spec.rank,
        lora_engine.layout.spec.alpha,
        lora_engine.layout.spec.dropout,
        lora_engine.layout.spec.rslora,
    )


def test_an_adapter_that_peft_saved_loads(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the vocabulary of a model without a name
        model.eval().save_pretrained(tmp_path)
    state, spec = load_adapter(tmp_path)
    assert (answers(engine(llama(), lora=spec), state) - model(input_ids=IDS).logits).abs().max() <= 1e-5


def test_merging_leaves_the_engine_as_it_was(tmp_path):
    lora_engine = engine(llama())
    adapter = moved(lora_engine.layout)
    before = answers(lora_engine, adapter)
    export_merged(lora_engine.model, tokenizer(), adapter, lora_engine.layout, tmp_path / "merged")
    assert torch.equal(answers(lora_engine, adapter), before)


def test_a_merged_export_does_not_overwrite(tmp_path):
    lora_engine = engine(llama())
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ModelError, match="not empty"):
        export_merged(lora_engine.model, tokenizer(), moved(lora_engine.layout), lora_engine.layout, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_merged_export_that_fails_leaves_nothing(tmp_path):
    lora_engine = engine(llama())
    with pytest.raises(AttributeError):
        export_merged(
            lora_engine.model, None, moved(lora_engine.layout), lora_engine.layout, tmp_path / "merged"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path) -> Path:
    lora_engine = engine(llama())
    save(tmp_path, lora_engine, moved(lora_engine.layout))
    return tmp_path


def test_the_config_lists_every_target_by_its_full_name(saved):
    names = json.loads((saved / CONFIG).read_text())["target_modules"]
    assert len(names) == 2 * 7
    assert "model.layers.0.self_attn.q_proj" in names


def test_the_card_is_written_as_it_is(saved):
    assert (saved / "README.md").read_text().strip() == "# A card"


def test_a_save_that_is_cut_off_leaves_the_old_adapter(saved, monkeypatch):
    before = load_adapter(saved)[0].sha256()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    lora_engine = engine(llama())
    with pytest.raises(OSError, match="No space"):
        save(saved, lora_engine, moved(lora_engine.layout, seed=1))
    assert load_adapter(saved)[0].sha256() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 16}),
        ("alpha_pattern", {"q_proj": 1}),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("auto_map", {"a": "b.C"}),
        ("invented_next_year", "on"),
        ("r", 8),
        ("r", 0),
        ("r", float("nan")),
        ("lora_alpha", "16"),
        ("target_modules", ["q_proj"]),
    ],
)
def test_a_config_that_means_something_else_is_refused(saved, field, value):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ModelError, match=r"not supported|is set|not rank|target_modules"):
        load_adapter(saved)


def rename_factor(folder: Path, old: str, new: str | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    value = tensors.pop(old)
    save_file(tensors | ({new: value} if new else {}), folder / WEIGHTS)


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), "is no adapter"),
    "corrupt config": (lambda f: (f / CONFIG).write_text("{"), "not readable JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
    "no rank": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), "does not say"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "damaged"),
    "half a pair": (lambda f: rename_factor(f, FACTOR, None), "one LoRA factor of two"),
    "another tensor": (
        lambda f: rename_factor(f, FACTOR, "base_model.model.lm_head.weight"),
        "not a LoRA factor",
    ),
    "empty": (lambda f: save_file({}, f / WEIGHTS), "empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_plainly(saved, damage):
    spoil, said = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(ModelError, match=said):
        load_adapter(saved)


def test_a_state_that_is_no_adapter_is_not_written(tmp_path):
    with pytest.raises(ModelError, match="not a LoRA factor"):
        save_adapter(tmp_path, AdapterState({"x": torch.ones(2)}), LoraSpec(), base_name="b", card="")
    assert list(tmp_path.iterdir()) == []
