"""What one update says about the tokens and the examples behind it: the shipped base model, random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks.inversion import (
    FirstInputs,
    Inapplicable,
    TokenRanking,
    invert,
    layer_inputs,
    membership,
    precision,
    recall,
    shrinkage,
)
from fedloom.attacks.view import ServerView, aggregated, upload
from fedloom.client import Client
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.models import load_base
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import LocalTraining, LoraSpec, Scored, Tokens

VOCABULARY = 4096
SGD = LocalTraining(optimizer="sgd", learning_rate=0.1, batch_size=4)
ADAMW = LocalTraining(epochs=10, learning_rate=4e-3, batch_size=4)  # one batch, so ten steps


def batch(
    distinct: int, *, seed: int = 0, count: int = 4, vocabulary: int = VOCABULARY
) -> tuple[set[int], list[Tokens]]:
    """`count` examples in which each of so many random tokens occurs twice or more."""
    stream = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(vocabulary - 5, generator=stream)[:distinct] + 5
    length = max(16, 2 * distinct // count)
    rounds = [
        tokens[torch.randperm(distinct, generator=stream)] for _ in range(-(-count * length // distinct))
    ]
    rows = torch.cat(rounds)[: count * length].view(count, length).tolist()
    return set(tokens.tolist()), [Tokens(tuple(row), (False,) + (True,) * (length - 1)) for row in rows]


class Scene:
    """A base model behind an engine, its first inputs, and an adapter before and after a warm-up round."""

    def __init__(self, rank: int, base: str = "embedded"):
        model, _ = load_base(base)
        lora = LoraSpec(rank=rank, alpha=2.0 * rank)
        self.engine = LoraEngine.build(model, lambda tokens: tokens, lora=lora)
        self.start = self.engine.initial_adapter(0)
        self.inputs = layer_inputs(model, self.start)
        if isinstance(self.inputs, FirstInputs):
            self.vocabulary = len(self.inputs.vectors)
            _, examples = batch(60, seed=99, vocabulary=self.vocabulary)
            self.warm = self.start + self.send(self.start, examples, ADAMW, client="warm").delta

    def send(
        self, adapter: AdapterState, examples: Sequence[Tokens], local: LocalTraining, *, client: str = "c"
    ) -> ServerView:
        owner = Client(client, examples, local=local)
        return upload(FedAvg(), Broadcast(1, {"adapter": adapter}), owner, self.engine)

    def ranked(self, view: ServerView, *, guesses: int = 64, decayed: float = 0.0) -> TokenRanking:
        assert isinstance(self.inputs, FirstInputs)
        found = invert(view, self.inputs, guesses=guesses, decayed=decayed)
        assert isinstance(found, TokenRanking)
        return found


@cache
def scene(rank: int, base: str = "embedded") -> Scene:
    return Scene(rank, base)


def noised(view: ServerView, *, clip: float, sd: float, seed: int) -> ServerView:
    stream = torch.Generator().manual_seed(seed)
    factor = min(1.0, clip / view.delta.norm())
    delta = view.delta.map(lambda t: factor * t + sd * torch.randn(t.shape, generator=stream))
    return replace(view, update=replace(view.update, states={"delta": delta}))


def test_fewer_tokens_than_directions_are_all_read_off_one_sgd_step() -> None:
    s, (tokens, examples) = scene(16), batch(8)
    ranking = s.ranked(s.send(s.warm, examples, SGD))
    assert recall(ranking, tokens).recall == 1.0
    assert ranking.explained == 8  # found without being told how many there are
    assert ranking.directions == 8  # below 3 * 16, so the span test alone is exact
    assert precision(ranking, tokens, threshold=1e-3) == 1.0


def test_more_tokens_than_directions_are_read_one_at_a_time() -> None:
    s, (tokens, examples) = scene(8), batch(64)
    view = s.send(s.warm, examples, SGD)
    ranking = s.ranked(view)
    assert ranking.directions == 24  # 3 * 8, for 64 tokens
    assert recall(ranking, tokens).recall >= 0.95


def test_a_search_that_uses_up_the_space_explains_nothing() -> None:
    s, (_, examples) = scene(8, "random:qwen3"), batch(100)
    assert (
        s.ranked(s.send(s.warm, examples, SGD)).explained is None
    )  # 64 guesses reduce any rows to nothing: d = 64


def test_the_span_test_alone_falls_with_tokens_beyond_the_rank_but_stays_above_chance() -> None:
    s, (tokens, examples) = scene(8), batch(64)
    found = recall(s.ranked(s.send(s.warm, examples, SGD), guesses=0), tokens)
    assert found.chance + 3 * found.chance_sd < found.recall < 0.9
    assert found.chance == 64 / 4096


@pytest.mark.parametrize(("distinct", "at_least"), [(8, 0.95), (64, 0.5)])
def test_ten_steps_of_adamw_do_not_hide_tokens(distinct: int, at_least: float) -> None:
    s, (tokens, examples) = scene(16), batch(distinct)
    assert recall(s.ranked(s.send(s.warm, examples, ADAMW)), tokens).recall >= at_least


def test_in_the_first_step_b_tells_what_a_does_not() -> None:
    s, (tokens, examples) = scene(16), batch(8)
    view = s.send(s.start, examples, SGD)
    assert all(not view.delta[key].any() for key in view.delta if key.endswith("lora_A.weight"))
    ranking = s.ranked(view)
    assert (ranking.factor, recall(ranking, tokens).recall) == ("B", 1.0)


def test_in_the_first_step_as_many_tokens_as_the_rank_hide() -> None:
    s, (_, examples) = scene(8), batch(8)
    assert isinstance(s.inputs, FirstInputs)
    answer = invert(s.send(s.start, examples, SGD), s.inputs)
    assert isinstance(answer, Inapplicable)
    assert "single out no token" in answer.reason


def test_an_update_of_zero_says_so() -> None:
    s, (_, examples) = scene(8), batch(8)
    assert isinstance(s.inputs, FirstInputs)
    view = s.send(s.warm, examples, replace(SGD, learning_rate=0.0))
    assert invert(view, s.inputs) == Inapplicable("The update of the first layer is zero.")


def test_clipping_to_one_and_noise_of_a_hundredth_leave_chance() -> None:
    s, clients = scene(16), 5
    found = []
    for seed in range(clients):
        tokens, examples = batch(32, seed=seed)
        view = noised(s.send(s.warm, examples, SGD, client=f"c{seed}"), clip=1.0, sd=0.01, seed=seed)
        found.append(recall(s.ranked(view, guesses=32), tokens))
    mean = sum(f.recall for f in found) / clients
    assert mean <= found[0].chance + 3 * found[0].chance_sd / clients**0.5


def test_the_mean_of_five_clients_hides_whose_tokens_they_are_and_not_which() -> None:
    s = scene(16)
    batches = [batch(8, seed=seed) for seed in range(5)]
    views = [s.send(s.warm, examples, SGD, client=f"c{i}") for i, (_, examples) in enumerate(batches)]
    ranking = s.ranked(aggregated(views))
    own = [recall(ranking, tokens).recall for tokens, _ in batches]
    assert sum(own) / 5 <= 0.2  # the first 8 of 40 ranked; 8 at most are true, for five clients together
    assert recall(ranking, set().union(*(tokens for tokens, _ in batches))).recall >= 0.95


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_putting_back_what_weight_decay_took_makes_the_span_exact_again(momentum: float) -> None:
    s, (tokens, examples) = scene(16), batch(8)
    rates: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.1, "momentum": momentum}
    view = s.send(s.warm, examples, replace(SGD, epochs=3, **rates))
    assert s.ranked(view, guesses=0).directions == 48  # A's own rows are among them
    ranking = s.ranked(view, decayed=shrinkage(steps=3, **rates))
    assert (ranking.explained, recall(ranking, tokens).recall) == (8, 1.0)


def test_decay_without_momentum_compounds() -> None:
    assert shrinkage(learning_rate=0.5, weight_decay=0.2, steps=2) == pytest.approx(0.19)  # 1 - 0.9^2


@pytest.mark.parametrize(
    ("base", "modules"),
    [
        ("qwen3", 3),  # q, k, v
        ("gemma2", 3),  # embeddings scaled before the norm
        ("olmo2", 3),  # no norm before attention
        ("phi", 4),  # LayerNorm, and an MLP beside attention
        ("gpt_neox", 2),  # q, k and v in one
    ],
)
def test_it_applies_wherever_positions_enter_inside_attention(base: str, modules: int) -> None:
    s = scene(8, f"random:{base}")
    assert isinstance(s.inputs, FirstInputs)
    assert len(s.inputs.modules) == modules
    tokens, examples = batch(8, vocabulary=s.vocabulary)
    assert recall(s.ranked(s.send(s.warm, examples, SGD)), tokens).recall >= 0.95


@pytest.mark.parametrize("base", ["gpt2", "opt"])
def test_learned_positions_are_refused_with_the_reason(base: str) -> None:
    inputs = scene(8, f"random:{base}").inputs
    assert isinstance(inputs, Inapplicable)
    assert "learned positions" in inputs.reason


def test_first_inputs_are_the_norm_of_the_embeddings_and_leave_no_hook() -> None:
    s = scene(8)
    model = s.engine.model
    assert isinstance(s.inputs, FirstInputs)
    with torch.no_grad():
        expected = model.model.layers[0].input_layernorm(model.get_input_embeddings().weight)
    assert torch.equal(s.inputs.vectors, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_adapter_without_the_first_layer_is_refused() -> None:
    s = scene(8)
    deep = AdapterState({k: t for k, t in s.start.items() if ".layers.3." in k})
    assert isinstance(layer_inputs(s.engine.model, deep), Inapplicable)


RANKING = TokenRanking(torch.tensor([4, 1, 3, 0, 2]), torch.tensor([0.5, 0.0, 0.9, 0.3, 0.1]), None, "A", 1)


def test_recall_counts_as_many_places_as_there_are_tokens() -> None:
    found = recall(RANKING, {1, 2})
    assert (found.recall, found.chance) == (1 / 2, 2 / 5)  # 4 and 1 come first
    assert found.chance_sd == pytest.approx((2 / 5 * 3 / 5 * 3 / 4 / 2) ** 0.5)


def test_tokens_of_the_prompt_format_neither_count_nor_take_up_places() -> None:
    assert recall(RANKING, {1, 3, 4}, known={4}).recall == 1.0  # 1 and 3 are first of 1, 3, 0, 2
    assert recall(RANKING, {4}, known={4}).tokens == 0


def test_precision_is_over_the_tokens_within_the_threshold() -> None:
    assert precision(RANKING, {1, 4}, threshold=0.4) == 2 / 3  # 1, 3 and 4 are within


def test_the_update_lowers_the_loss_of_members_more() -> None:
    s = scene(8)
    (_, members), (_, others) = batch(64, seed=1), batch(64, seed=2)
    view = s.send(s.warm, members, ADAMW)
    scores = membership(view, s.engine, [*members, *others])
    assert min(scores[:4]) > max(scores[4:])


def test_rounding_of_losses_is_not_ranked() -> None:
    class Answers:
        def answer(self, requests: Any) -> Any:
            return {
                "before": [Scored(3.0, 1), Scored(3.0, 1)],
                "after": [Scored(3.0 - 2e-7, 1), Scored(3.0 + 2e-7, 1)],
            }

    zero = AdapterState({"a": torch.zeros(1)})
    view = ServerView(Broadcast(0, {"adapter": zero}), Update("c", {"delta": zero}, 1.0))
    assert membership(view, Answers(), ["one", "other"]) == [0.0, 0.0]
