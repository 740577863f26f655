"""The two ways to read prompts and continue them, beside each other and by what they run and hold."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCABULARY, engine, llama, moved
from transformers import DynamicCache

from fedloom.engine import decoding as subject
from fedloom.engine import generation
from fedloom.engine.bank import Tuning
from fedloom.engine.decoding import FastDecoding, Layout, PlainDecoding, decoding
from fedloom.engine.generation import generate_all
from fedloom.steps import Generate, LoraSpec


@cache
def served(device: str = "cpu"):
    """An engine, in float64 where nothing is against it, and three adapters."""
    base = llama(torch.float64 if device == "cpu" else torch.float32, initializer_range=0.2).to(device)
    lora_engine = engine(base, lora=LoraSpec(rank=4, alpha=8.0))
    return lora_engine.served, [moved(lora_engine.layout, seed=seed) for seed in range(3)]


def prompts(*lengths: int, start: tuple[int, ...] = (), seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [[*start, *torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()] for n in lengths]


START = tuple(range(10, 50))


def steps(way: FastDecoding | PlainDecoding, count: int, leaving: dict[int, list[int]]) -> list[torch.Tensor]:
    """Logits after the prompts and after each of `count` tokens; `leaving[step]` are the rows that go on."""
    found = [way.read()]
    for step in range(count):
        tokens = found[-1].argmax(-1).tolist()
        if step in leaving:
            way.keep(leaving[step])
            tokens = [tokens[row] for row in leaving[step]]
        found.append(way.append(tokens))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shared", [(), START])
def test_both_ways_have_the_same_logits_while_rows_leave(shared, device):
    serving, adapters = served(device)
    asked = sorted([*prompts(1, 2, 9, 30, start=shared), *prompts(5, 60, 61, seed=1)], key=len)
    with serving.rows({i: Tuning(a) for i, a in enumerate(adapters)}) as rows:
        owners = [0, 1, 0, 1, 2, -1, 0]
        fast = FastDecoding(serving.model, serving.packed, rows, asked, owners, new=9)
        plain = PlainDecoding(serving.model, rows, asked, owners)
        leaving = {2: [0, 1, 3, 5, 6], 4: [1, 3], 6: [1]}
        pairs = list(zip(steps(fast, 8, leaving), steps(plain, 8, leaving), strict=True))
    assert [len(one) for one, _ in pairs] == [7, 7, 7, 5, 5, 2, 2, 1, 1]
    # transformers' norms compute in float32
    close = 1e-5 if device == "cpu" else 1e-3
    assert max(float((one - other).abs().max()) for one, other in pairs) < close


def test_what_prompts_of_an_adapter_begin_with_is_run_once(monkeypatch):
    serving, adapters = served()
    read: list[int] = []
    hook = serving.model.base_model.register_forward_pre_hook(
        lambda module, given, named: read.append(int(named["input_ids"].numel())), with_kwargs=True
    )
    try:
        for start in ((), START):
            asked = prompts(*[64 - len(start)] * 8, start=start)
            generate_all(serving, {0: Generate(asked, adapters[0], 1), 1: Generate(asked, adapters[1], 1)})
    finally:
        hook.remove()
    assert read == [2 * 8 * 64, 2 * (40 + 8 * 24) + 48]  # padded to a multiple of 64


def test_a_prompt_that_is_asked_often_is_read_once(monkeypatch):
    serving, adapters = served()
    packed = []
    real = subject.pack
    monkeypatch.setattr(
        subject, "pack", lambda part, *more, **named: packed.append(len(part)) or real(part, *more, **named)
    )
    [one], [other] = prompts(20), prompts(21, seed=1)
    [first, *rest] = generate_all(serving, {0: Generate([one] * 5 + [other], adapters[0], 6)})[0]
    assert packed == [2]
    assert rest[:-1] == [first] * 4
    assert rest[-1] == generate_all(serving, {0: Generate([other], adapters[0], 6)})[0][0] != first


def test_a_step_writes_into_memory_taken_once_and_less_of_it_when_rows_leave():
    serving, adapters = served()
    with serving.rows({0: Tuning(adapters[0])}) as rows:
        way = FastDecoding(serving.model, serving.packed, rows, prompts(4, 5, 20), [0] * 3, new=6)
        held = []
        logits = way.read()
        for step in range(5):
            if step == 3:
                way.keep([0, 1])
                logits = logits[:2]
            layer = way._cache.layers[0]
            held.append((layer.memory[0].data_ptr(), len(layer.memory[0])))
            logits = way.append(logits.argmax(-1).tolist())
    assert len(set(held[:3])) == len(set(held[3:])) == 1
    assert [slots for _, slots in held] == [45] * 3 + [20] * 2  # 2 (5 + 5) + 1 (20 + 5)


def test_rows_of_like_length_share_a_block():
    layout = Layout.of([10, 11, 12, 13, 40, 41, 200], 10)
    assert [block.lengths for block in layout.blocks] == [(10, 11, 12, 13), (40, 41), (200,)]
    assert [block.offset for block in layout.blocks] == [0, 4 * 23, 4 * 23 + 2 * 51]
    assert layout.slots == 4 * 23 + 2 * 51 + 210


def test_a_batch_holds_no_more_tokens_than_its_budget(monkeypatch):
    serving, adapters = served()
    held: list[int] = []
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 100)
    monkeypatch.setattr(
        generation,
        "decoding",
        lambda *given, **more: held.append((way := decoding(*given, **more))._layout.slots) or way,
    )
    asked = prompts(3, 3, 4, 5, 20, 21, 60, 150)
    answers = generate_all(serving, {0: Generate(asked, adapters[0], 10), 1: Generate(asked[:2], None, 40)})
    assert [len(answer) for answer in answers[0] + answers[1]] == [10] * 8 + [40] * 2
    assert len(held) > 3
    assert max(held[:-1]) <= 100 < held[-1]  # one prompt that exceeds it goes alone


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_with_room_for_more_tokens_gets_more(device, monkeypatch):
    config = llama().config  # 2 layers of 2 heads for keys, 8 numbers each
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30)
    )
    model = SimpleNamespace(device=torch.device(device), config=config, dtype=torch.bfloat16)
    expected = {"cpu": 16_384, "cuda": 2**28 // 128}  # a quarter; 2 * 2 * 2 * 8 * 2 bytes
    assert generation._tokens_per_batch(model) == expected[device]


def test_what_failed_its_check_is_left_to_the_model(monkeypatch):
    serving, adapters = served()
    request = {0: Generate(prompts(3, 9, 12), adapters[0], max_new_tokens=5)}
    expected = generate_all(serving, request)
    monkeypatch.setattr(serving, "decoding_reason", "layers of type conv")
    with serving.rows({0: Tuning(adapters[0])}) as rows:
        way = decoding(serving, rows, prompts(3), [0], new=5)
        way.read()
    assert isinstance(way, PlainDecoding)
    assert isinstance(way._cache, DynamicCache)
    assert generate_all(serving, request) == expected


def test_the_reference_path_is_left_to_the_model():
    slow = engine(llama(), path="reference").served
    with slow.rows({}) as rows:
        assert isinstance(decoding(slow, rows, prompts(3), [-1], new=5), PlainDecoding)
