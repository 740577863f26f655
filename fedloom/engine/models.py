"""Load a base model and its tokenizer, and refuse plainly those that cannot be used.

A name is `embedded` (ships with the package), `random:llama` or similar (random weights from a fixed
seed, to try things out), a local folder, or an id on the Hugging Face Hub. Only safetensors are read and
no code that comes with a model is run. The network is used only where `allow_download` says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as remarks

from fedloom import rng
from fedloom.engine import fp8
from fedloom.errors import ModelError

DType = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Quantize = Literal["8bit", "4bit", "fp8"]

RANDOM = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gemma",
    "gemma2",
    "mistral",
    "phi",
    "phi3",
    "gpt_neox",
    "opt",
    "olmo2",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LEAVE = ["*/*", "consolidated*"]  # the same weights in other formats
_FETCH = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_base(
    name: str,
    *,
    dtype: DType = "auto",
    device: Device = "auto",
    quantize: Quantize | None = None,
    allow_download: bool = False,
) -> tuple[Any, Any]:
    """A frozen causal language model in evaluation mode, and its tokenizer.

    dtype "auto" is bfloat16 on CUDA devices that compute in it and float32 elsewhere, whatever the files
    hold. A tokenizer without a padding token gets one in memory; nothing here depends on which.
    """
    place = device_of(device)
    number = _dtype(dtype, place)
    folder = base_folder(name, allow_download=allow_download)
    if quantize in ("8bit", "4bit") and (folder is None or not find_spec("bitsandbytes")):
        missing = (
            "a trained model" if folder is None else "the package bitsandbytes: pip install 'fedloom[quant]'"
        )
        raise ModelError(f'quantize="{quantize}" needs {missing}.')
    with _quiet():
        if folder is None:
            tokenizer = _load_tokenizer(_embedded())
            model = _random(name.removeprefix("random:"), tokenizer)
        else:
            config = _load_config(folder)
            tokenizer = _load_tokenizer(folder)
            model = _load_model(folder, config, number, place, quantize)
    if quantize in (None, "fp8"):
        model = model.to(device=place, dtype=number)
    if quantize == "fp8":
        fp8.quantise(model)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name!r}: the tokenizer has {tokenizer.vocab_size} tokens and the model embeds {rows}; "
            "they do not belong together."
        )
    return model.requires_grad_(False).eval(), _completed(tokenizer, model.config)


def skeleton(name: str, *, allow_download: bool = False) -> tuple[Any, Any]:
    """The model without weights, on the meta device, and its tokenizer: for shapes and counts."""
    folder = base_folder(name, allow_download=allow_download)
    with _quiet():
        tokenizer = _load_tokenizer(folder or _embedded())
        if folder is None:
            model = _random(name.removeprefix("random:"), tokenizer).to("meta")
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_load_config(folder))
    return model, _completed(tokenizer, model.config)


def base_folder(name: str, *, allow_download: bool = False) -> Path | None:
    """The folder that holds a base model, downloaded first if that is allowed; None for a random model.

    Raises ModelError at once, without asking the network, for a name that cannot exist.
    """
    if name.startswith("random:"):
        return None
    if name == "embedded":
        return _embedded()
    local = Path(name).expanduser()
    if name and local.is_dir():
        return local
    if name and local.exists():
        raise ModelError(f"{name!r} is a file; expected the folder that holds config.json and the weights.")
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or ("/" in name and local.parent.is_dir()):
        raise ModelError(
            f"There is no folder {name!r}{_from_here(local)}; give a model folder, a Hub id, or 'embedded'."
        )
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=_FETCH, ignore_patterns=_LEAVE, local_files_only=not allow_download
            )
        )
    except Exception as error:  # the Hub client raises many kinds, none of which a user can act on as it is
        if allow_download:
            raise ModelError(
                f"{name!r} could not be downloaded from the Hub: {_first_line(error)}"
            ) from error
        raise ModelError(
            f"There is no folder {name!r}{_from_here(local)}, and no Hub model of that name in the local cache. "
            "If a folder is meant, give its whole path. Only if the Hub's model of that name is meant, which anybody "
            "may have put there: model.allow_download=true."
        ) from None


def _from_here(path: Path) -> str:
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def identity(name: str, *, allow_download: bool = False) -> str:
    """sha256 of a base model as it is stored, whatever dtype, device or quantisation it is computed in."""
    folder = base_folder(name, allow_download=allow_download)
    return base_hash(
        _random(name.removeprefix("random:"), _load_tokenizer(_embedded())) if folder is None else folder
    )


def base_hash(source: str | Path | nn.Module) -> str:
    """sha256 of a base model's weights: names, dtypes, shapes, bytes.

    Given a folder it covers the stored values, in however many files, and so does not depend on the dtype a site
    computes in: sites compare this hash. Given a module it covers the values in memory.
    """
    digest = hashlib.sha256()
    named = _named_parameters(source) if isinstance(source, nn.Module) else _stored_tensors(Path(source))
    for name, tensor in named:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_parameters(model: Any) -> int:
    """How many numbers the base model has; tied weights count once, quantised ones in full."""
    return int(model.num_parameters())


def _load_model(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device, quantize: Quantize | None
) -> Any:
    for file in _weight_files(folder):
        _open(file)
    options: dict[str, Any] = {"dtype": dtype}
    if quantize in ("8bit", "4bit"):
        # One remark per layer and forward on the precision it computes in.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit",
            load_in_4bit=quantize == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{folder} could not be loaded as a causal language model: {_first_line(error)}"
        ) from error
    model, info = loaded
    if lost := sorted(map(str, info["missing_keys"])):
        raise ModelError(
            f"{folder}: the weights lack {len(lost)} tensors of {type(model).__name__}, first {lost[0]!r}; "
            "the files are incomplete or of another architecture."
        )
    return model


def _load_config(folder: Path) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        hint = (
            "it is an adapter; give its base model"
            if (folder / "adapter_config.json").exists()
            else "no model"
        )
        raise ModelError(f"{folder} has no config.json ({hint}).")
    try:
        said = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{file} is not readable JSON: {_first_line(error)}. Copy the model again."
        ) from error
    if not isinstance(said, dict) or "model_type" not in said:
        raise ModelError(f"{file} does not say its model_type; it is not a transformers model.")
    if "auto_map" in said:
        raise ModelError(
            f"{folder} brings its own code, which fedloom does not run; use a model that transformers knows."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{file}: {_first_line(error)}") from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"{folder} is an encoder-decoder ({config.model_type}); fedloom tunes causal language models."
        )
    kinds = config.architectures or []
    if kinds and not any(
        kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in kinds
    ):
        raise ModelError(f"{folder} holds a {kinds[0]}; fedloom tunes causal language models.")
    return config


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelError(
            f"{folder} has no usable tokenizer ({_first_line(error)}); put its tokenizer.json beside the weights."
        ) from error


def _completed(tokenizer: Any, config: Any) -> Any:
    """With an end that its model names, and with padding."""
    if tokenizer.eos_token_id is None and isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({_first_line(error)}); copy the model again.") from error
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ModelError(f"{folder} lacks {shard!r}, which its index names; copy the model again.")
        return [folder / shard for shard in shards]
    found = folder / "model.safetensors"
    if found.is_file():
        return [found]
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has its weights only as pickle files, which can run code when read and are refused. "
            "Convert them once with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you "
            "trust them."
        )
    raise ModelError(f"{folder} has no model.safetensors.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or cut short ({_first_line(error)}); copy it again.") from error


def _random(kind: str, tokenizer: Any) -> Any:
    if kind not in RANDOM:
        raise ModelError(f"There is no random model of kind {kind!r}; choose one of {', '.join(RANDOM)}.")
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,  # OPT's second name for it
        intermediate_size=128,
        ffn_dim=128,  # OPT's name for it
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(0, "base", kind))
        return AutoModelForCausalLM.from_config(config)


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.named_parameters(), key=lambda item: item[0])


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    where = {name: opened for opened in map(_open, _weight_files(folder)) for name in opened.keys()}  # noqa: SIM118
    for name in sorted(where):
        yield name, where[name].get_tensor(name)


def _embedded() -> Path:
    return Path(str(files("fedloom") / "embedded"))


def kind_of(device: Device) -> Literal["cpu", "cuda", "mps"]:
    return device_of(device).type  # type: ignore[return-value]  # of these three kinds, see Device


def device_of(device: Device) -> torch.device:
    """What is computed on; "auto" is the fastest kind that is there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there.get(device, False):
        raise ModelError(
            f'device="{device}" is not available here; there is {", ".join(k for k in there if there[k])}.'
        )
    return torch.device(device)


def _dtype(dtype: DType, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in known:
        raise ModelError(f'dtype="{dtype}" is not one of auto, {", ".join(known)}.')
    return known[dtype]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log messages from transformers; the ones that matter are raised here as errors."""
    level, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity_error()
    remarks.disable_progress_bar()
    try:
        yield
    finally:
        remarks.set_verbosity(level)
        if bars:
            remarks.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
