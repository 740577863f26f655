"""Does the fast path compute what the reference computes, on this very model? Asked once, at build time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from fedloom.engine import fp8
from fedloom.engine.attention import Blocks
from fedloom.engine.bank import AdapterBank, Tuning
from fedloom.engine.decoding import FastDecoding
from fedloom.engine.dropout import Dropout, token_keys
from fedloom.engine.forward import PackedModel
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Encoded, Item, pack
from fedloom.engine.reference import ReferenceModel
from fedloom.engine.serving import ServedModel
from fedloom.state import AdapterState

# relative error of the loss and of each target's gradient that rounding may explain
TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5, torch.bfloat16: 8e-2, torch.float16: 2e-2}
_ROPES = ("dynamic", "longrope")  # they turn by the longest position in the batch
_LAYERS = ("full_attention", "sliding_attention")
_STEPS = 4  # tokens decoded


@fp8.whole_weights()
def mismatch(
    packed: PackedModel,
    reference: ReferenceModel,
    model: Any,
    layout: AdapterLayout,
    *,
    dtype: torch.dtype,
) -> str | None:
    """None if both paths agree; otherwise the component to blame, and what it did.

    Two rows and four examples of different lengths share one pass, and two examples begin alike, so a leak between
    examples, a wrong row, or a lost window, cap or scale all show. Windows longer than the examples are checked by name.
    """
    config = model.config.get_text_config()
    if reason := _declared(config):
        return reason
    adapters = two_adapters(layout, dtype)
    bank = AdapterBank(layout, [Tuning(a) for a in adapters], dtype=dtype, device=model.device, training=True)
    rate = layout.spec.dropout
    first, *examples = (_random_example(n, config.vocab_size, seed=i) for i, n in enumerate(_lengths(config)))
    items: list[Item] = []
    for number, (row, example) in enumerate(
        zip((0, 0, 0, 1), (first, _sibling(examples[0]), *examples), strict=True)
    ):
        keys = token_keys(0, ("check",), number, len(example.ids)) if rate else None
        items.append(Item(row, example, weight=1.0 / 10, keys=keys))
    try:
        blocks, hidden, fast = _fast(packed, bank, items, model.dtype, rate)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, this model cannot take the fast path
        return f"attention: {type(error).__name__}: {error}"
    assert bank.grads is not None
    if reason := _windows(config, blocks):
        return reason
    tolerance = TOLERANCE[model.dtype]
    for row, adapter in enumerate(adapters):
        reference.load(Tuning(adapter))
        for factor in reference.factors.values():
            factor.grad = None
        for number, item in enumerate(items):
            if item.row != row:
                continue
            keys = item.keys
            dropout = Dropout(rate, 0, keys.to(model.device)) if keys is not None else None
            nll = reference.nll(item.example, dropout)
            (nll * item.weight).backward()
            slow = float(nll.detach())
            if not abs(fast[number] - slow) <= tolerance * abs(slow):
                theirs = reference.hidden(item.example, dropout)[item.example.at]
                same = float((hidden[number] - theirs).norm() / theirs.norm()) <= tolerance
                part = "head" if same else "attention or positions"
                return f"{part}: loss {fast[number]:.6g}, reference {slow:.6g}"
        slow_grads = reference.gradient().to(bank.grads)
        for target in layout:
            span = slice(target.offset, target.end)
            ours, theirs = bank.grads[row, span], slow_grads[span]
            off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
            if not off <= tolerance:
                return f"gradient of {target.name}: relative error {off:.1e}"
    return None


@fp8.whole_weights()
@torch.no_grad()
def decoding_mismatch(served: ServedModel, packed: PackedModel, reference: ReferenceModel) -> str | None:
    """The same for answers: logits after prompts, and after tokens that follow them one by one.

    Five prompts of two adapters: two begin alike, and two of similar length lie side by side in memory. Half-way the
    shortest leaves, so that the others move.
    """
    model, adapters = served.model, two_adapters(served.layout, served.dtype)
    config = model.config.get_text_config()
    odd = sorted(set(get_layer_types_and_kwargs(config)[0]) - set(_LAYERS))
    if odd:
        return f"layers of type {', '.join(odd)} keep more than keys and values"
    short, long, middle = (
        _random_example(n, config.vocab_size, seed=i) for i, n in enumerate(_lengths(config))
    )
    if len(short.ids) <= _STEPS:
        return "the model reads too few tokens to be checked"
    asked = [(0, short.ids), (0, middle.ids[1:]), (1, middle.ids), (0, _sibling(long).ids), (0, long.ids)]
    asked.sort(key=lambda one: len(one[1]))
    expected: list[Tensor] = []  # for each: (_STEPS, V)
    for row, ids in asked:
        reference.load(Tuning(adapters[row]))
        at = torch.arange(len(ids) - _STEPS, len(ids))
        expected.append(reference.logits(Encoded(ids, at, ids[at])))
    try:
        with served.rows({row: Tuning(adapter) for row, adapter in enumerate(adapters)}) as rows:
            prompts = [ids[: 1 - _STEPS].tolist() for _, ids in asked]
            owners = [rows.index[row] for row, _ in asked]
            under_way = FastDecoding(model, packed, rows, prompts, owners, new=_STEPS)
            going = list(range(len(asked)))
            for step in range(_STEPS):
                if step == _STEPS // 2:
                    going = going[1:]
                    under_way.keep(going)
                ours = (
                    under_way.append([int(asked[i][1][step - _STEPS]) for i in going])
                    if step
                    else under_way.read()
                )
                for i, logits in zip(going, ours, strict=True):
                    theirs = expected[i][step]
                    off = float((logits.to(theirs) - theirs).norm() / theirs.norm())
                    if not off <= TOLERANCE[model.dtype]:
                        return f"logits after {len(prompts[i]) + step} tokens: relative error {off:.1e}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, this model cannot be decoded so
        return f"{type(error).__name__}: {error}"
    return None


def two_adapters(layout: AdapterLayout, dtype: torch.dtype) -> list[AdapterState]:
    """Unlike each other and unlike the base."""
    return [_far_from_zero(layout, seed).to(dtype) for seed in (0, 1)]


def _declared(config: Any) -> str | None:
    """Read from the configuration the features that a short check cannot see."""
    odd = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in _LAYERS})
    if odd:
        return f"attention: layers of type {', '.join(odd)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in _ROPES:
            return f"positions: {kind['rope_type']} rope depends on the other examples of a batch"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "attention: chunked attention"
    return None


def _windows(config: Any, blocks: Blocks) -> str | None:
    """Every layer that the configuration gives a window must have asked for it."""
    if not blocks.windows:
        return "attention: the model does not use transformers' attention interface"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        expected = 0
    elif kinds:
        expected = list(kinds).count("sliding_attention")
    else:
        expected = len(blocks.windows)
    got = sum(asked is not None for asked in blocks.windows)
    if got < expected:
        return f"attention: {expected} layers have a sliding window, {got} asked for it"
    return None


def _lengths(config: Any) -> tuple[int, int, int]:
    """Three different lengths; one is longer than a small sliding window."""
    window = getattr(config, "sliding_window", None)
    most = getattr(config, "max_position_embeddings", None) or 40
    return (min(7, most), min(40 if window is None or window > 256 else window + 9, most), min(13, most))


def _random_example(length: int, vocabulary: int, *, seed: int) -> Encoded:
    stream = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (length + 1,), generator=stream)
    at = torch.arange(length // 2, length)
    return Encoded(ids[:length], at, ids[at + 1])


def _sibling(example: Encoded) -> Encoded:
    """An example with the same beginning, which then runs backwards."""
    n = len(example.ids) // 2
    ids = torch.cat([example.ids[:n], example.ids.flip(0)[: n // 2]])
    at = torch.arange(n // 2, len(ids) - 1)
    return Encoded(ids, at, ids[at + 1])


def _far_from_zero(layout: AdapterLayout, seed: int) -> Any:
    """An adapter whose two factors both matter: a few per cent of a layer's output."""
    vector = layout.to_vector(layout.initial(seed))
    stream = torch.Generator().manual_seed(seed)
    for target in layout:
        target.b(vector).normal_(0.0, 0.05, generator=stream)
    return layout.to_state(vector)


def _fast(
    packed: PackedModel, bank: AdapterBank, items: list[Item], dtype: torch.dtype, rate: float
) -> tuple[Blocks, list[Tensor], list[float]]:
    """All items in one pass: the calls of attention, last hidden states at each item's labels, nats of each item.

    Leaves the gradients in the bank.
    """
    with packed.plan.kernels(), packed.own_attention():
        batch = pack(
            list(enumerate(items)),
            bank,
            multiple=packed.plan.multiple,
            dtype=dtype,
            dropout=(rate, 0) if rate else None,
        )
        blocks = batch.blocks
        hidden = packed.hidden(batch, blocks)
        nll = packed.nll(batch, hidden)
        (nll * batch.weights).sum().backward()
    sums = torch.zeros(len(items), dtype=torch.float64)
    sums.index_add_(0, batch.label_item, nll.detach().double().cpu()[batch.label_of])
    at = batch.label_at[batch.label_of.to(hidden.device)]  # (L,)
    counts = [len(item.example.at) for item in items]
    return blocks, list(hidden.detach()[at].split(counts)), sums.tolist()
