"""The claim everything rests on: K clients in one batch equal K clients alone equal plain PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import (
    LOCAL,
    distance,
    engine,
    example,
    examples,
    llama,
    moved,
    norms_in_double,
    peft_factors,
    plain_peft,
    shape,
    train_by_hand,
)
from torch import nn

from fedloom.engine.bank import Tuning
from fedloom.steps import Fit, LocalTraining, LoraSpec, Score

LORA = LoraSpec(rank=4, alpha=8.0)
ADAMW = LocalTraining(batch_size=4, learning_rate=3e-3, weight_decay=0.01, epochs=2)
SGD = LocalTraining(batch_size=4, learning_rate=0.3, optimizer="sgd")
STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


def jobs(layout, dtype=torch.float32, local: LocalTraining = LOCAL, count: int = 4) -> dict[int, Fit]:
    """Unequal numbers of examples: 3, 8, 13, 18; unequal starts."""
    return {
        k: Fit(moved(layout, dtype, seed=k), examples(3 + 5 * k, k), local, stream=(f"c{k}", "local"))
        for k in range(count)
    }


def worst(model, local: LocalTraining, lora: LoraSpec = LORA, **options) -> tuple[float, float]:
    """Largest difference of any factor, together against alone and together against PEFT."""
    fast = engine(model, lora=lora, path="fast", tokens_per_pass=150, **options)
    requests = jobs(fast.layout, model.dtype, local)
    together = fast.answer(requests)
    assert len({fitted.steps for fitted in together.values()}) == len(requests)
    alone = {key: fast.answer({key: job})[key] for key, job in requests.items()}
    peft = plain_peft(model, lora)
    by_hand = {key: train_by_hand(peft, job) for key, job in requests.items()}
    assert all(distance(job.adapter, by_hand[key]) > 1e-3 for key, job in requests.items())
    return (
        max(distance(together[key].adapter, alone[key].adapter) for key in requests),
        max(distance(together[key].adapter, by_hand[key]) for key in requests),
    )


def test_cohort_equals_alone_equals_peft_in_float64_with_adamw():
    with norms_in_double():
        alone, peft = worst(llama(torch.float64), ADAMW)
    assert alone < 1e-10
    assert peft < 1e-10


def test_cohort_equals_alone_equals_peft_in_float32_with_sgd():
    alone, peft = worst(llama(), SGD)
    assert alone < 1e-6
    assert peft < 1e-6


def test_cohort_equals_alone_equals_peft_in_float32_with_adamw_to_its_rounding():
    alone, peft = worst(llama(), ADAMW)
    assert alone < 3e-4  # Adam divides by tiny gradients, which doubles rounding many times
    assert peft < 3e-4


def test_a_group_too_wide_for_one_masked_product_equals_peft():
    with norms_in_double():
        wide = LoraSpec(rank=48, alpha=8.0, rslora=True)  # 4 * 48 columns > DENSE_COLUMNS
        model = llama(torch.float64)
        fast = engine(model, lora=wide, path="fast")
        requests = jobs(fast.layout, torch.float64, ADAMW)
        peft = plain_peft(model, wide)
        for key, fitted in fast.answer(requests).items():
            assert distance(fitted.adapter, train_by_hand(peft, requests[key])) < 1e-10


def test_checkpointing_changes_nothing():
    model = llama()
    plain, thrifty = engine(model), engine(model, checkpointing=True, path="fast")
    requests = jobs(plain.layout)
    for one, other in zip(plain.answer(requests).values(), thrifty.answer(requests).values(), strict=True):
        assert one.adapter.sha256() == other.adapter.sha256()


def kept_for_backward(checkpointing: bool) -> int:
    trained = engine(llama(num_hidden_layers=6), checkpointing=checkpointing)
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained.answer({0: Fit(moved(trained.layout), examples(4), LOCAL, limit=4)})
    return sum(sizes)


def test_checkpointing_keeps_less_for_the_backward_pass():
    assert kept_for_backward(True) < kept_for_backward(False) / 3


class BlackBox(nn.Linear):
    """Stands for a quantised layer: only its forward is known, its weight cannot be multiplied with."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2.0, self.bias)


def test_a_layer_known_by_its_forward_only_is_trained_as_peft_trains_it():
    with norms_in_double():
        model = llama(torch.float64)
        for layer in model.model.layers:
            box = BlackBox(32, 48, bias=False, dtype=torch.float64)
            box.weight = layer.mlp.up_proj.weight
            layer.mlp.up_proj = box
        assert {t.kind for t in engine(model).layout} == {"linear", "opaque"}
        alone, peft = worst(model, ADAMW)
    assert max(alone, peft) < 1e-10


def test_the_size_of_a_pass_moves_no_result():
    with norms_in_double():
        model = llama(torch.float64)
        answers = []
        for budget in (20, 150, 4096):
            trained = engine(model, path="fast", tokens_per_pass=budget)
            answers.append(trained.answer(jobs(trained.layout, torch.float64, ADAMW)))
    for other in answers[1:]:
        assert max(distance(answers[0][k].adapter, other[k].adapter) for k in other) < 1e-10


def test_same_requests_same_bits():
    trained = engine(llama())
    requests = jobs(trained.layout)
    first = {key: f.adapter.sha256() for key, f in trained.answer(requests).items()}
    again = {key: f.adapter.sha256() for key, f in trained.answer(requests).items()}
    anew = {key: f.adapter.sha256() for key, f in engine(llama()).answer(requests).items()}
    assert first == again == anew


def test_a_bfloat16_base_keeps_its_adapters_in_float32_and_learns_the_same():
    model = llama()
    exact, coarse = engine(model), engine(model.to(torch.bfloat16), path="fast")
    requests = jobs(exact.layout, local=SGD)
    for key, one in exact.answer(requests).items():
        other = coarse.answer(requests)[key]
        assert {t.dtype for t in other.adapter.values()} == {torch.float32}
        change, start = one.adapter - requests[key].adapter, requests[key].adapter
        assert (other.adapter - start - change).norm() < 0.1 * change.norm()


def test_many_adapters_are_scored_in_one_pass_as_by_peft():
    model = llama()
    fast, slow = engine(model, path="fast"), engine(model, path="reference")
    requests = {k: Score(examples(4, k), moved(fast.layout, seed=k)) for k in range(3)}
    requests[3] = Score(examples(5, 3), None)
    ours, theirs = fast.answer(requests), slow.answer(requests)
    for key in requests:
        assert [s.targets for s in ours[key]] == [s.targets for s in theirs[key]]
        assert [s.nll for s in ours[key]] == pytest.approx([s.nll for s in theirs[key]], rel=1e-5)


def test_scores_of_the_base_are_those_of_the_untouched_model():
    model = llama()
    [one] = tokens = [example(20, 0)]
    with torch.no_grad():
        logits = model(torch.tensor([one.ids])).logits[0]
    expected = sum(-torch.log_softmax(logits[i - 1], -1)[one.ids[i]] for i in range(20) if one.labelled[i])
    trained = engine(model)
    scored = trained.answer({"base": Score(tokens), "start": Score(tokens, trained.initial_adapter(0))})
    assert scored["base"][0].nll == pytest.approx(float(expected), rel=1e-5)
    assert scored["start"][0].nll == pytest.approx(float(expected), rel=1e-5)  # B = 0
    assert scored["base"][0].targets == 10


def test_rows_of_different_adapters_are_served_in_one_padded_batch():
    model = llama()
    served = engine(model)
    adapters = {"a": moved(served.layout, seed=1), "b": moved(served.layout, seed=2), "base": None}
    ids = torch.tensor([example(12, seed).ids for seed in range(4)])
    keys = ["b", "base", "a", "b"]
    with served.served.rows({key: Tuning(adapter) for key, adapter in adapters.items()}) as rows:
        owner = torch.tensor([rows.index[key] for key in keys])[:, None].expand(ids.shape)
        with rows.tokens(owner[:, :9]):
            first = served.model(ids[:, :9], use_cache=True)  # then one token at a time, with the cache
            logits = [first.logits]
        for i in range(9, 12):
            with rows.tokens(owner[:, :1]):
                step = served.model(ids[:, i : i + 1], past_key_values=first.past_key_values)
                logits.append(step.logits)
    ours = torch.cat(logits, 1)
    peft = plain_peft(model, LORA)
    for row, key in enumerate(keys):
        with torch.no_grad():
            for name, factor in peft_factors(peft).items():
                factor.copy_(adapters[key][name] if adapters[key] else torch.zeros_like(factor))
            assert torch.allclose(ours[row], peft(ids[row : row + 1]).logits[0], atol=1e-5)


def test_after_an_answer_the_model_is_the_base_with_its_own_attention():
    model = llama()
    trained = engine(model)
    trained.answer(jobs(trained.layout))
    assert trained.model.config._attn_implementation == model.config._attn_implementation
    ids = torch.tensor([example(12, 0).ids])
    assert torch.equal(trained.model(ids).logits, model(ids).logits)


def test_an_answer_leaves_the_callers_precision_alone():
    torch.set_float32_matmul_precision("high")
    try:
        trained = engine(llama())
        trained.answer(jobs(trained.layout))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260K beside the project")
def test_cohort_equals_alone_equals_peft_on_trained_weights():
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float64).eval()
    with norms_in_double():
        alone, peft = worst(model, ADAMW)
    assert max(alone, peft) < 1e-10


def test_a_model_without_grouped_keys_equals_peft():
    with norms_in_double():
        model = llama(torch.float64, **shape(num_key_value_heads=4, tie_word_embeddings=True))
        alone, peft = worst(model, ADAMW, LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "v_proj")))
    assert max(alone, peft) < 1e-10
