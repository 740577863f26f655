"""The work that contestants share: random models, and clients with examples as long as dolly's.

Words are drawn at random: the cost of training depends only on lengths. The total length of an example is
log-normal with a median of 150 and a 95th percentile of 600 tokens, cut at 512; three in ten have a context;
about 35% of the tokens are response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from peft import get_peft_model_state_dict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers.loss import loss_utils
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from fedloom.engine.layout import AdapterLayout
from fedloom.state import AdapterState
from fedloom.steps import Tokens

CUTOFF = 512  # tokens of an example
WORDS = 3000
SIZES = {  # hidden, layers, heads, intermediate, vocabulary, tied embeddings
    "tiny": (32, 2, 2, 64, 4096, True),
    "1M": (96, 4, 4, 256, 4096, False),
    "5M": (192, 6, 6, 512, 8192, False),
    "15M": (288, 6, 6, 768, 32000, True),
    "30M": (384, 10, 6, 1024, 32000, True),
    "7B": (4096, 32, 32, 11008, 32000, False),
}
TASK = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
WITH_CONTEXT = (
    TASK
    + ", paired with an input that provides further context. "
    + ASK
    + "{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
WITHOUT = TASK + ". " + ASK + "{instruction}\n\n### Response:\n"
OPENFEDLLM = TASK + ". " + ASK + "{instruction} \n\n### Response: {response}{eos}"


@dataclass(frozen=True, eq=False)
class Example:
    """One instruction; a new object every time it is drawn, so that its tokens are never cached."""

    instruction: str
    context: str
    response: str


Encode = Callable[[Example], Tokens]


def shepherd_tokens(tokenizer: Any) -> Encode:
    """All tokens after the first count; the end of text is added where there is room."""

    def encode(example: Example) -> Tokens:
        frame = WITH_CONTEXT if example.context else WITHOUT
        text = frame.format(instruction=example.instruction, context=example.context) + example.response
        ids = _cut(tokenizer, text)
        if ids[-1] != tokenizer.eos_token_id and len(ids) < CUTOFF:
            ids = [*ids, tokenizer.eos_token_id]
        return _counting_from(1, ids)

    return encode


def openfedllm_tokens(tokenizer: Any) -> Encode:
    """Tokens after the last word "Response:" count; none if it was cut off."""
    mark, eos = tokenizer.convert_tokens_to_ids("Response:"), tokenizer.eos_token

    def encode(example: Example) -> Tokens:
        instruction = f"{example.instruction} {example.context}" if example.context else example.instruction
        ids = _cut(tokenizer, OPENFEDLLM.format(instruction=instruction, response=example.response, eos=eos))
        places = [i for i, token in enumerate(ids) if token == mark]
        return _counting_from(places[-1] + 1 if places else len(ids), ids)

    return encode


def prompt_of(example: Example, tokenizer: Any) -> list[int]:
    return _cut(tokenizer, WITHOUT.format(instruction=example.instruction))


def _cut(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=CUTOFF)["input_ids"])


def _counting_from(first: int, ids: list[int]) -> Tokens:
    return Tokens(tuple(ids), tuple(i >= first for i in range(len(ids))))


def clients(count: int, samples: int, *, seed: int = 42) -> list[list[Example]]:
    """`samples` examples each, give or take a fifth from 40 on. The same arguments give the same clients."""
    draw = np.random.default_rng(seed)
    spread = math.log(4) / 1.645  # of log length, so that 150 * 4 is the 95th percentile

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(0, WORDS, n))

    def example() -> Example:
        length = int(np.clip(draw.lognormal(math.log(150), spread), 60, 2000))
        has_context = draw.random() < 0.3
        body = max(length - (57 if has_context else 38), 8)  # without the frame
        response = max(3, int(body * draw.beta(3, 3.5)))
        rest = max(3, body - response)
        asked = max(min(rest - 1, int(draw.integers(6, 20))), 1) if has_context else rest
        return Example(words(asked), words(max(rest - asked, 1)) if has_context else "", words(response))

    sizes = [
        samples if samples < 40 else int(np.clip(draw.normal(samples, 0.2 * samples), 40, None))
        for _ in range(count)
    ]
    return [[example() for _ in range(size)] for size in sizes]


def tokenizer() -> Any:
    """One token per word: cheaper than any real one, which favours peers that tokenize every round."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    frames = " ".join((WITH_CONTEXT, WITHOUT)).replace("\n", " ").split()
    for word in ["\n", *frames, *(f"w{i}" for i in range(WORDS))]:
        vocabulary.setdefault(word, len(vocabulary))
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    words.pre_tokenizer = pre_tokenizers.Sequence(split)  # type: ignore[assignment]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def llama(size: str, dtype: torch.dtype = torch.float32, *, device: str = "cpu") -> Any:
    """A Llama with random weights.

    On a CPU the same in every dtype except for rounding; elsewhere created on the device in `dtype`.
    """
    hidden, layers, heads, intermediate, vocabulary, tied = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if device == "cpu" else dtype)
    try:
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def later_adapter(layout: AdapterLayout, dtype: torch.dtype) -> AdapterState:
    """An adapter as a later round broadcasts it: neither factor is zero."""
    start = layout.to_vector(layout.initial(0)).double()
    noise = torch.randn(layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return layout.to_state((start + 0.02 * noise).to(dtype))


def adapter_of(peft: Any) -> AdapterState:
    """A copy of what a PEFT model has learnt."""
    state = get_peft_model_state_dict(peft)
    return AdapterState({name: t.detach().to("cpu", copy=True) for name, t in state.items()})


def put(peft: Any, adapter: AdapterState) -> None:
    """Set a PEFT model's factors and give them the adapter's dtype."""
    with torch.no_grad():
        for name, factor in peft.named_parameters():
            if factor.requires_grad:
                factor.data = adapter[name.replace(".default", "")].to(factor.device, copy=True)


# --- figures of a workload, by arithmetic -------------------------------------------------------------------


def slots(lengths: Sequence[int], *, micro_batch: int, multiple: int = 1) -> int:
    """Token slots that a padded loader runs: each micro-batch as wide as its longest example, rounded up."""
    parts = [lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch)]
    return sum(len(part) * -(-max(part) // multiple) * multiple for part in parts)


@dataclass(frozen=True)
class Work:
    """The contents of a round, whoever runs it."""

    tokens: int  # real tokens, forward and backward
    labelled: int
    slots: int  # including padding

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.slots

    @property
    def labelled_share(self) -> float:
        """The labelled tokens' share of all slots."""
        return self.labelled / self.slots

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.labelled + other.labelled, self.slots + other.slots)


def flops(model: Any, *, tokens: int, head_rows: int) -> float:
    """FLOP of the frozen base's matrix products: per weight 2 forward and 2 for the input's gradient.

    The head works on `head_rows` only. Attention scores and LoRA, a few per cent, are left out.
    """
    head = model.get_output_embeddings().weight
    linear = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head
    )
    return 4.0 * (tokens * linear + head_rows * head.numel())


def lengths_of(examples: Sequence[Tokens]) -> dict[str, float]:
    """Percentiles and mean of the lengths, and the share of tokens that count."""
    n = np.array([len(tokens.ids) for tokens in examples])
    labelled = sum(tokens.targets for tokens in examples)
    middle = {f"p{p}": float(np.percentile(n, p)) for p in (5, 50, 95)}
    return middle | {"mean": float(n.mean()), "labelled": labelled / float(n.sum())}


@contextmanager
def everything_in_double() -> Iterator[None]:
    """Keep norms, rotations and losses in float64; transformers uses float32 even in a float64 model."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rope(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()  # (B, T, D / 2)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), reduction="sum"
        )
        return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    with (
        patch.object(LlamaRMSNorm, "forward", norm),
        patch.object(LlamaRotaryEmbedding, "forward", rope),
        patch.dict(loss_utils.LOSS_MAPPING, ForCausalLM=loss),
    ):
        yield
