from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from fedloom.engine.fp8 import Fp8Linear
from fedloom.engine.models import RANDOM, base_folder, base_hash, count_parameters, load_base
from fedloom.errors import ModelError

SHARED = Path(__file__).parents[2].parent / "shared" / "models"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A whole model folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **SMALL)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def logits(model) -> torch.Tensor:
    return model(torch.arange(1, 9)[None]).logits


def test_a_folder_loads_frozen_in_evaluation_mode_and_float32_on_cpu(saved):
    model, _ = load_base(str(saved), device="cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_dtype_asked_for_is_the_dtype_loaded(saved, dtype):
    model, _ = load_base(str(saved), dtype=dtype, device="cpu")
    assert logits(model).dtype == getattr(torch, dtype)


def test_loading_says_nothing(saved, capfd):
    load_base(str(saved), device="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_published_small_models_load(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here")
    model, spelling = load_base(str(SHARED / name), device="cpu")
    assert spelling.eos_token_id is not None
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", RANDOM)
def test_random_models_are_the_same_every_time(kind):
    one, two = (load_base(f"random:{kind}", device="cpu")[0] for _ in range(2))
    assert base_hash(one) == base_hash(two)
    assert one.config.model_type == kind
    assert torch.isfinite(logits(one)).all()


def test_the_embedded_model_loads_by_name():
    model, spelling = load_base("embedded", device="cpu")
    assert count_parameters(model) <= 16_000_000
    assert spelling.eos_token_id is not None


def test_a_random_model_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_base("random:llama", device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_parameters_are_counted_with_tied_ones_once():
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=True, **SMALL))
    free = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=False, **SMALL))
    assert count_parameters(free) - count_parameters(tied) == 100 * 16


def test_base_hash_is_of_the_values_and_not_of_the_files(saved, tmp_path):
    LlamaForCausalLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert base_hash(tmp_path) == base_hash(saved)


def test_base_hash_sees_one_changed_value(copy, saved):
    model = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(copy)
    assert base_hash(copy) != base_hash(saved)


def test_base_hash_of_a_module_and_of_its_folder_agree(saved):
    assert base_hash(LlamaForCausalLM.from_pretrained(saved)) == base_hash(saved)


def test_a_tokenizer_without_padding_gets_one(saved):
    assert load_base(str(saved), device="cpu")[1].pad_token == "<end>"


def test_a_missing_end_of_text_is_taken_from_the_models_config(copy):
    tokenizer(eos=None).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 256}))
    assert load_base(str(copy), device="cpu")[1].eos_token == "<end>"


def overwrite_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_architecture(folder: Path) -> None:
    overwrite_config(folder, num_hidden_layers=3)


def foreign_tokenizer(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **SMALL)).save_pretrained(folder)


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "an adapter": (adapter, "it is an adapter"),
    "corrupt config": (lambda f: (f / "config.json").write_text('{"model_type": '), "not readable JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not readable JSON"),
    "config of something else": (lambda f: (f / "config.json").write_text("[]"), "model_type"),
    "unknown architecture": (lambda f: overwrite_config(f, model_type="frobnicator"), "frobnicator"),
    "own code": (lambda f: overwrite_config(f, auto_map={"AutoModelForCausalLM": "x.Y"}), "own code"),
    "encoder-decoder": (lambda f: T5Config(d_model=8).save_pretrained(f), "encoder-decoder"),
    "encoder": (
        lambda f: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(f),
        "BertForMaskedLM",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "only pickles": (pickle_only, "pickle"),
    "truncated weights": (truncate, "cut short"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut short"),
    "a missing tensor": (
        another_architecture,
        "lack 9 tensors",
    ),  # 7 linear maps and 2 norms of the third layer
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "lacks 'b.safetensors'",
    ),
    "a shard elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../b.safetensors"}}'
        ),
        "lacks",
    ),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no usable",
    ),
    "corrupt tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no usable tokenizer"),
    "another model's tokenizer": (foreign_tokenizer, "do not belong together"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_plain_line(copy, damage):
    spoil, said = DAMAGES[damage]
    spoil(copy)
    with pytest.raises(ModelError, match=said) as error:
        load_base(str(copy), device="cpu")
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nobody/no-such-model", "no-such-model", ""])
def test_a_model_that_is_nowhere_is_refused_without_asking_the_network(name):
    with pytest.raises(ModelError, match="no folder"):
        load_base(name)


def test_a_file_is_refused_as_a_folder(saved):
    with pytest.raises(ModelError, match="is a file"):
        base_folder(str(saved / "config.json"))


def test_an_unknown_random_kind_names_the_known_ones():
    with pytest.raises(ModelError, match="llama, qwen2"):
        load_base("random:mamba")


def test_quantising_a_random_model_is_refused():
    with pytest.raises(ModelError, match="trained model"):
        load_base("random:llama", quantize="4bit")


def test_fp8_needs_neither_a_package_nor_training():
    model, _ = load_base("random:llama", quantize="fp8", dtype="bfloat16", device="cpu")
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is type(layer.self_attn.q_proj) is Fp8Linear
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16


def test_quantising_without_its_package_names_the_extra(saved, monkeypatch):
    monkeypatch.setattr("fedloom.engine.models.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"fedloom\[quant\]"):
        load_base(str(saved), quantize="4bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(saved):
    with pytest.raises(ModelError, match="there is cpu"):
        load_base(str(saved), device="cuda")
