"""Weighted examples in Fit, energies in Score, ready Tokens, and the penalty on repetition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.errors import ConfigError
from fedloom.steps import Fit, Generate, LocalTraining, Score, Tokens
from tests.engine.tiny_models import (
    LOCAL,
    distance,
    engine,
    example,
    examples,
    llama,
    moved,
    peft_factors,
    plain_peft,
)

PATHS = ["fast", "reference"]
SGD = LocalTraining(optimizer="sgd", learning_rate=0.1, batch_size=100, clip=0.0)


def one(trained: Any, request: Any) -> Any:
    return trained.answer({"": request})[""]


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_one_change_no_bit(path: Any) -> None:
    trained = engine(llama(), path=path)
    fit = Fit(moved(trained.layout), examples(6), LOCAL)
    plain, weighted = one(trained, fit), one(trained, replace(fit, weights=[1.0] * 6))
    assert plain.adapter.sha256() == weighted.adapter.sha256()
    assert plain.loss == weighted.loss


@pytest.mark.parametrize("path", PATHS)
def test_a_step_follows_the_weighted_gradient_of_plain_peft(path: Any) -> None:
    model, mine, weights = llama(), examples(5), [0.0, 0.5, 1.0, 2.0, 3.5]
    trained = engine(model, path=path)
    start = moved(trained.layout)
    peft = plain_peft(model, trained.layout.spec)
    factors = peft_factors(peft)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(start[name])
    loss = sum(w * _losses(peft, tokens).sum() for w, tokens in zip(weights, mine, strict=True))
    loss = loss / sum(tokens.targets for tokens in mine)
    loss.backward()
    fitted = one(trained, Fit(start, mine, SGD, weights=weights))
    assert fitted.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, factor in factors.items():
        expected = factor.detach() - 0.1 * factor.grad
        assert torch.allclose(fitted.adapter[name], expected, atol=1e-6), name


def test_both_paths_weigh_alike_over_several_steps() -> None:
    model, weights = llama(), [0.2, 3.0, 1.0, 0.0, 2.0, 0.7, 1.1]
    fast, slow = (engine(model, path=path) for path in PATHS)
    fit = Fit(moved(fast.layout), examples(7), LOCAL, weights=weights, stream=("a",))
    assert distance(one(fast, fit).adapter, one(slow, fit).adapter) < 1e-4


def test_a_jobs_weights_are_its_own() -> None:
    trained = engine(llama(), path="fast")
    plain = Fit(moved(trained.layout), examples(4), LOCAL, stream=("a",))
    heavy = Fit(moved(trained.layout, seed=1), examples(4, 1), LOCAL, stream=("b",), weights=[9.0] * 4)
    together = trained.answer({"a": plain, "b": heavy})
    assert distance(together["a"].adapter, one(trained, plain).adapter) < 1e-4


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0] * 5, [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]]
)
@pytest.mark.parametrize("path", PATHS)
def test_weights_that_do_not_fit_are_refused(path: Any, weights: list[float]) -> None:
    trained = engine(llama(), path=path)
    with pytest.raises(ConfigError, match="Expected 3 weights"):
        one(trained, Fit(trained.initial_adapter(0), examples(3), LOCAL, weights=weights))


@pytest.mark.parametrize("path", PATHS)
def test_an_energy_is_minus_the_mean_logsumexp_where_labels_are(path: Any) -> None:
    model, mine = llama(), examples(5)
    trained = engine(model, path=path)
    adapter = moved(trained.layout)
    peft = plain_peft(model, trained.layout.spec)
    with torch.no_grad():
        for name, factor in peft_factors(peft).items():
            factor.copy_(adapter[name])
        for scored, tokens in zip(one(trained, Score(mine, adapter, energy=True)), mine, strict=True):
            logits = peft(input_ids=torch.tensor([tokens.ids])).logits[0]
            at = torch.tensor(tokens.labelled).nonzero()[:, 0] - 1
            assert scored.energy == pytest.approx(-float(logits[at].logsumexp(-1).mean()), abs=1e-5)
            assert scored.nll == pytest.approx(float(_losses(peft, tokens).sum()), rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_energies_come_only_where_they_are_asked_for(path: Any) -> None:
    trained = engine(llama(), path=path)
    adapter = moved(trained.layout)
    answers = trained.answer(
        {
            "a": Score(examples(3), adapter),
            "b": Score(examples(2, 1), adapter, energy=True),
            "c": Score(examples(2, 2), energy=True),
            "d": Score(examples(2, 3)),
        }
    )
    assert [s.energy for key in "ad" for s in answers[key]] == [None] * 5
    for key, n, of in (("b", 2, adapter), ("c", 2, None)):
        alone = one(trained, Score(examples(n, 1 if key == "b" else 2), of, energy=True))
        assert [s.energy for s in answers[key]] == pytest.approx([s.energy for s in alone], abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_an_example_without_labels_has_no_energy(path: Any) -> None:
    [scored] = one(engine(llama(), path=path), Score([example(6, 0, labelled=0)], energy=True))
    assert (scored.nll, scored.targets, scored.energy) == (0.0, 0, 0.0)


def test_a_diverged_adapter_spoils_no_other_energy() -> None:
    trained = engine(llama(), path="fast")
    sound = moved(trained.layout)
    answers = trained.answer(
        {"a": Score(examples(2), sound * math.nan, energy=True), "b": Score(examples(2), sound, energy=True)}
    )
    assert all(math.isnan(s.energy) for s in answers["a"])
    assert all(math.isfinite(s.energy) for s in answers["b"])


def test_ready_tokens_are_taken_as_they_are() -> None:
    def encode(number: int) -> Tokens:
        return example(8, number)

    trained = engine(llama(), encode=encode)
    adapter = moved(trained.layout)
    mixture = one(trained, Score([1, example(8, 1), 2], adapter))
    assert mixture[0].nll == pytest.approx(mixture[1].nll, rel=1e-5)
    assert one(trained, Fit(adapter, [3, example(8, 4)], LOCAL)).examples == 2


def test_a_penalty_of_one_changes_no_answer() -> None:
    trained = engine(llama(), path="fast")
    request = Generate([[1, 5, 9], [1, 7]], max_new_tokens=12)
    assert one(trained, request) == one(trained, replace(request, repetition_penalty=1.0))


def test_a_great_penalty_lets_no_token_come_twice() -> None:
    trained = engine(llama(), path="fast")
    adapter = moved(trained.layout, seed=3)
    request = Generate([[1, 5, 9], [1, 7]], adapter, max_new_tokens=20)
    assert any(len(set(said)) < 20 for said in one(trained, request))  # without it, some do
    for said in one(trained, replace(request, repetition_penalty=1e6)):
        assert len(set(said)) == 20


def test_a_penalty_falls_on_answers_and_not_on_what_the_prompt_said() -> None:
    trained = engine(llama(), path="fast")
    [[first]] = one(trained, Generate([[1, 5, 9]], max_new_tokens=1))
    prompt = [1, first, 5, 9]
    plain = one(trained, Generate([prompt], max_new_tokens=1))
    assert one(trained, Generate([prompt], max_new_tokens=1, repetition_penalty=1e6)) == plain


def test_a_penalty_is_a_requests_own() -> None:
    trained = engine(llama(), path="fast")
    request = Generate([[1, 5, 9]], max_new_tokens=20)
    strict = replace(request, repetition_penalty=1e6)
    together = trained.answer({"a": request, "b": strict})
    assert together == {"a": one(trained, request), "b": one(trained, strict)}
    assert together["a"] != together["b"]


def _losses(model: Any, tokens: Tokens) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens.ids[1:]), reduction="none")
    return losses[torch.tensor(tokens.labelled[1:])]
