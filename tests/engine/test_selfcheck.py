"""The self-check must see what it is for: each part is broken once, and must be named."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import LOCAL, causal_lm, engine, examples, llama, moved, shape

from fedloom.engine import attention, decoding, head, packing, selfcheck
from fedloom.engine.bank import RowGroup
from fedloom.errors import ModelError
from fedloom.steps import Fit, Generate, LoraSpec


def test_a_sound_model_takes_the_fast_path_and_gives_no_reason():
    sound = engine(llama())
    assert (sound.path, sound.path_reason, sound.decoding_reason) == ("fast", "", "")


def test_the_reference_path_can_be_asked_for():
    asked = engine(llama(), path="reference")
    assert (asked.path, asked.path_reason) == ("reference", "asked for")
    assert asked.decoding_reason == "training takes the reference path: asked for"


def test_examples_that_see_each_other_are_noticed(monkeypatch):
    def one_span(self):
        return [attention.Span(slice(0, sum(self.lengths)), slice(0, 0))]

    monkeypatch.setattr(attention.Blocks, "spans", one_span)
    monkeypatch.setattr(attention.Blocks, "longest", property(lambda self: sum(self.lengths)))
    assert engine(llama()).path_reason.startswith("attention or positions: loss")


def test_a_prefix_that_its_examples_do_not_see_is_noticed(monkeypatch):
    def blind(self):
        return [attention.Span(span.own, slice(0, 0)) for span in spans(self)]

    spans = attention.Blocks.spans
    monkeypatch.setattr(attention.Blocks, "spans", blind)
    assert engine(llama()).path_reason.startswith("attention or positions: loss")


def test_positions_that_do_not_restart_are_noticed(monkeypatch):
    def shifted(*args, **options):
        packed = pack(*args, **options)
        object.__setattr__(packed, "positions", packed.positions * 2)
        return packed

    pack = packing.pack
    monkeypatch.setattr("fedloom.engine.selfcheck.pack", shifted)
    assert engine(llama()).path_reason.startswith("attention or positions: loss")


def test_a_lost_logit_scale_is_noticed(monkeypatch):
    logits = head.LabelHead.logits
    monkeypatch.setattr(head.LabelHead, "logits", lambda self, hidden: logits(self, hidden) * 1.01)
    assert engine(llama()).path_reason.startswith("head: loss")


def test_a_wrong_gradient_is_noticed_and_its_layer_named(monkeypatch):
    add = RowGroup.add_gradient

    def wrong(self, target, da, *others):
        add(self, target, da * (1.001 if target.name.endswith("layers.1.mlp.up_proj") else 1.0), *others)

    monkeypatch.setattr(RowGroup, "add_gradient", wrong)
    assert engine(llama()).path_reason.startswith("gradient of model.layers.1.mlp.up_proj: relative error")


def test_rows_that_are_mixed_up_are_noticed(monkeypatch):
    factors = RowGroup.factors

    def swapped(self, target, *others):
        a, b = factors(self, target, *others)
        return a.roll(1, 0), b

    monkeypatch.setattr(RowGroup, "factors", swapped)
    assert "loss" in engine(llama()).path_reason


def test_a_window_longer_than_the_check_must_be_asked_for():
    """The window is 4096 tokens here; no short example could show that a layer has lost it."""
    options = shape(use_sliding_window=True, sliding_window=4096, max_window_layers=0)
    model = causal_lm(transformers.Qwen2Config(**options))
    assert engine(model).path == "fast"
    model.model.layers[1].self_attn.sliding_window = None
    assert engine(model).path_reason == "attention: 2 layers have a sliding window, 1 asked for it"


def test_a_broken_fast_path_is_refused_where_it_was_demanded(monkeypatch):
    logits = head.LabelHead.logits
    monkeypatch.setattr(head.LabelHead, "logits", lambda self, hidden: logits(self, hidden) * 1.01)
    with pytest.raises(ModelError, match=r"does not fit this model\. head: loss"):
        engine(llama(), path="fast")


def test_after_falling_back_jobs_are_trained_right(monkeypatch):
    expected = engine(llama(), path="reference")
    job = {0: Fit(moved(expected.layout), examples(5), LOCAL)}
    with monkeypatch.context() as broken:
        logits = head.LabelHead.logits
        broken.setattr(head.LabelHead, "logits", lambda self, hidden: logits(self, hidden) * 1.01)
        fallen = engine(llama())
    assert fallen.path == "reference"
    assert fallen.answer(job)[0].adapter.sha256() == expected.answer(job)[0].adapter.sha256()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rounding_of_the_dtype_is_not_taken_for_a_fault(dtype, dropout):
    sound = engine(llama(dtype), lora=LoraSpec(dropout=dropout))
    assert (sound.path, sound.decoding_reason) == ("fast", "")


def test_a_model_shorter_than_the_check_is_checked_within_its_length():
    short = engine(llama(max_position_embeddings=6))
    assert (short.path, short.decoding_reason) == ("fast", "")
    assert "too few tokens" in engine(llama(max_position_embeddings=4)).decoding_reason


def wrong_positions(self):
    return [n + self.steps for block in self.blocks for n in block.lengths]


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (decoding.Layout, "positions", wrong_positions),
        (decoding._Layer, "move", lambda self, before, after, rows: None),
        (decoding.Layout, "bias", lambda self, block, begin, like: None),
    ],
)
def test_answers_that_differ_are_left_to_the_model(owner, name, broken, monkeypatch):
    request = {0: Generate([[5, 6, 7], list(range(3, 20))], None, max_new_tokens=6)}
    expected = engine(llama(torch.float64)).answer(request)
    monkeypatch.setattr(owner, name, broken)
    fallen = engine(llama(torch.float64))
    assert fallen.path == "fast"
    assert fallen.decoding_reason.startswith(("logits after", "RuntimeError"))
    assert fallen.answer(request) == expected


def test_caches_of_another_kind_are_left_to_the_model(monkeypatch):
    monkeypatch.setattr(
        selfcheck, "get_layer_types_and_kwargs", lambda config: (["full_attention", "conv"], [])
    )
    assert engine(llama()).decoding_reason == "layers of type conv keep more than keys and values"
