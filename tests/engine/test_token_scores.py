"""Score(per_token=True): what a model thought of each labelled token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedloom.engine.head import LabelHead
from fedloom.steps import Score, TokenScores
from tests.engine.tiny_models import (
    engine,
    example,
    examples,
    llama,
    moved,
    peft_factors,
    plain_peft,
)

PATHS = ["fast", "reference"]


def one(trained: Any, request: Any) -> Any:
    return trained.answer({"": request})[""]


def flat(scored: Any) -> list[float]:
    return [x for s in scored for column in (s.tokens.logp, s.tokens.mean, s.tokens.std) for x in column]


@pytest.mark.parametrize("path", PATHS)
def test_token_scores_are_those_of_plain_peft(path: Any) -> None:
    model, mine = llama(), examples(5)
    trained = engine(model, path=path)
    adapter = moved(trained.layout)
    peft = plain_peft(model, trained.layout.spec)
    with torch.no_grad():
        for name, factor in peft_factors(peft).items():
            factor.copy_(adapter[name])
        for scored, tokens in zip(one(trained, Score(mine, adapter, per_token=True)), mine, strict=True):
            ids, labelled = torch.tensor([tokens.ids]), torch.tensor(tokens.labelled)
            logp = (
                peft(input_ids=ids).logits[0].double().log_softmax(-1)[labelled.nonzero()[:, 0] - 1]
            )  # (m, V)
            mean = (logp.exp() * logp).sum(-1)
            variance = (logp.exp() * logp.square()).sum(-1) - mean.square()
            assert scored.tokens.logp == pytest.approx(
                logp.gather(1, ids[0][labelled, None])[:, 0].tolist(), abs=1e-5
            )
            assert scored.tokens.mean == pytest.approx(mean.tolist(), abs=1e-5)
            assert scored.tokens.std == pytest.approx(variance.sqrt().tolist(), abs=1e-5)


def test_both_paths_score_tokens_alike() -> None:
    fast, slow = (engine(llama(), path=path) for path in PATHS)
    for adapter in (None, moved(fast.layout)):
        request = Score(examples(6), adapter, per_token=True)
        assert flat(one(fast, request)) == pytest.approx(flat(one(slow, request)), abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_log_probabilities_of_tokens_add_up_to_the_loss(path: Any) -> None:
    trained = engine(llama(), path=path)
    for scored in one(trained, Score(examples(4), moved(trained.layout), per_token=True)):
        assert -sum(scored.tokens.logp) == pytest.approx(scored.nll, rel=1e-6)
        assert len(scored.tokens.logp) == len(scored.tokens.mean) == len(scored.tokens.std) == scored.targets


@pytest.mark.parametrize("path", PATHS)
def test_token_scores_come_only_where_they_are_asked_for(path: Any) -> None:
    trained = engine(llama(), path=path, tokens_per_pass=64)
    adapter = moved(trained.layout)
    answers = trained.answer(
        {
            "a": Score(examples(3), adapter),
            "b": Score(examples(5, 1), adapter, per_token=True),
            "c": Score(examples(4, 2), per_token=True, energy=True),
            "d": Score(examples(2, 3), energy=True),
        }
    )
    assert [s.tokens for key in "ad" for s in answers[key]] == [None] * 5
    for key, request in (
        ("b", Score(examples(5, 1), adapter, per_token=True)),
        ("c", Score(examples(4, 2), per_token=True)),
    ):
        assert flat(answers[key]) == pytest.approx(flat(one(trained, request)), abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_an_example_without_labels_has_no_token_scores(path: Any) -> None:
    mute, spoken = example(6, 0, labelled=0), example(6, 1)
    trained = engine(llama(), path=path)
    [alone] = one(trained, Score([mute], per_token=True))
    assert alone.tokens == TokenScores((), (), ())
    beside = one(trained, Score([mute, spoken, mute], per_token=True))
    assert [len(s.tokens.logp) for s in beside] == [0, 3, 0]


def test_a_diverged_adapter_spoils_no_other_token_scores() -> None:
    trained = engine(llama(), path="fast")
    sound = moved(trained.layout)
    answers = trained.answer(
        {
            "a": Score(examples(2), sound * math.nan, per_token=True),
            "b": Score(examples(2), sound, per_token=True),
        }
    )
    assert all(math.isnan(x) for x in flat(answers["a"]))
    assert all(math.isfinite(x) for x in flat(answers["b"]))


def test_tokens_a_model_rules_out_weigh_nothing() -> None:
    """Logits (0, 0, -inf): log p is -ln 2 wherever p is not 0, so its mean is -ln 2 and it does not vary."""
    linear = torch.nn.Linear(1, 3)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([0.0, 0.0, -math.inf]))
    head = LabelHead(linear, scale=1.0, softcap=None, chunk=64)
    [found] = head.token_statistics(torch.ones(1, 1), torch.tensor([0]), torch.tensor([1])).tolist()
    assert found == pytest.approx([-math.log(2), -math.log(2), 0.0], abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_every_score_holds_the_loss_of_its_last_labelled_token(path: Any) -> None:
    trained, mute = engine(llama(), path=path, tokens_per_pass=64), example(6, 0, labelled=0)
    spoken = examples(5)
    request = Score([mute, *spoken, mute], moved(trained.layout), per_token=True)
    first, *between, last = one(trained, request)
    assert (first.last, last.last) == (None, None)
    assert [s.last for s in between] == pytest.approx([-s.tokens.logp[-1] for s in between], abs=1e-6)
