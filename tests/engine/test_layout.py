from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from peft import get_peft_model_state_dict
from scipy.stats import ks_2samp, kstest
from tiny_models import causal_lm, distance, llama, moved, plain_peft

from fedloom import lora
from fedloom.engine.layout import AdapterLayout
from fedloom.errors import ModelError, ShapeMismatch
from fedloom.rng import key
from fedloom.state import AdapterState
from fedloom.steps import LoraSpec

COLLIDE = (72540, 87852)  # names whose keys share their low 32 bits, all that seeds a torch generator
GPT2 = transformers.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def layout(**options) -> AdapterLayout:
    return AdapterLayout.of(llama(), LoraSpec(rank=4, **options))


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (llama(), "all-linear"),
        (llama(), ("q_proj", "down_proj")),
        (causal_lm(GPT2), "all-linear"),
        (causal_lm(GPT2), ("c_attn", "mlp.c_proj")),
    ],
    ids=["llama", "llama by name", "gpt2", "gpt2 by name"],
)
def test_names_and_shapes_are_those_peft_saves(model, targets):
    spec = LoraSpec(rank=4, targets=targets)
    ours = AdapterLayout.of(model, spec).initial(0)
    theirs = get_peft_model_state_dict(plain_peft(model, spec))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_vector_and_back_changes_nothing():
    state = moved(layout())
    assert distance(layout().to_state(layout().to_vector(state)), state) == 0.0


def test_a_state_shares_no_memory_with_the_vector():
    vector = torch.zeros(layout().size)
    state = layout().to_state(vector)
    vector.fill_(1.0)
    assert state.norm() == 0.0


def test_size_counts_every_factor_once():
    assert layout().size == layout().initial(0).numel()


def test_initial_a_is_uniform_within_one_over_root_inputs_and_b_is_zero():
    for name, tensor in layout().initial(0).items():
        if "lora_B" in name:
            assert not tensor.any()
        else:  # kaiming_uniform with a = sqrt(5): bound sqrt(6 / (1 + 5) / inputs)
            assert 0.8 / tensor.shape[1] ** 0.5 < tensor.abs().max() <= 1.0 / tensor.shape[1] ** 0.5


def test_initial_a_is_distributed_as_peft_draws_it():
    torch.manual_seed(0)
    model = llama()
    theirs = [
        t for k, t in get_peft_model_state_dict(plain_peft(model, LoraSpec(rank=64))).items() if "lora_A" in k
    ]
    drawn = AdapterLayout.of(model, LoraSpec(rank=64)).initial(3)
    ours = [t for k, t in drawn.items() if "lora_A" in k]
    # Times the root of its inputs, every value is uniform in [-1, 1].
    one, other = (torch.cat([t.flatten() * t.shape[1] ** 0.5 for t in them]) for them in (ours, theirs))
    assert kstest(one.numpy(), "uniform", args=(-1, 2)).pvalue > 0.01
    assert ks_2samp(one.numpy(), other.numpy()).pvalue > 0.01
    assert one.var().item() == pytest.approx(1 / 3, rel=0.02)
    assert len({tuple(t.flatten()[:4].tolist()) for t in ours}) == len(ours)  # no two modules begin alike


def test_modules_whose_keys_share_their_low_32_bits_start_apart():
    one, other = (replace(layout().targets[0], name=f"layer.{i}") for i in COLLIDE)
    assert key(0, "adapter", one.name) % 2**32 == key(0, "adapter", other.name) % 2**32
    first, second = (
        AdapterLayout(LoraSpec(rank=4), (t,)).initial(0)[lora.key(t.key, "A")] for t in (one, other)
    )
    assert not torch.equal(first, second)


def test_initial_depends_on_the_seed_and_on_nothing_else():
    first = layout().initial(1)
    torch.manual_seed(5)
    assert layout().initial(1).sha256() == first.sha256()
    assert layout().initial(2).sha256() != first.sha256()


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert LoraSpec(rank=16, alpha=8.0).scale == 0.5  # 8 / 16
    assert LoraSpec(rank=16, alpha=8.0, rslora=True).scale == 2.0  # 8 / sqrt(16)


def test_a_dotted_end_names_one_of_several_modules_with_the_same_last_part():
    model = causal_lm(GPT2)
    targets = AdapterLayout.of(model, LoraSpec(targets=("mlp.c_proj",))).targets
    assert [t.name for t in targets] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert {(t.kind, t.inputs, t.outputs) for t in targets} == {("conv1d", 128, 32)}


def test_an_unknown_target_is_refused_with_the_names_there_are():
    with pytest.raises(ModelError, match=r"'query'.*down_proj, gate_proj"):
        layout(targets=("q_proj", "query"))


def test_the_end_of_a_word_is_not_the_end_of_a_name():
    with pytest.raises(ModelError, match="'proj'"):
        layout(targets=("proj",))


def test_a_state_of_another_shape_is_refused_by_name():
    state = dict(layout().initial(0))
    name = next(iter(state))
    with pytest.raises(ShapeMismatch, match="lora_A"):
        layout().to_vector(AdapterState({**state, name: torch.zeros(3, 3)}))
    del state[name]
    with pytest.raises(ShapeMismatch, match="1 tensors"):
        layout().to_vector(AdapterState(state))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ModelError, match="Expected"):
        LoraSpec(**wrong)
