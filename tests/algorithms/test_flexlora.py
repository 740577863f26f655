"""FlexLoRA's server: the mean of products, at the adapter's rank, without a product of full size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.algorithms.aggregators import weighted_mean
from fedloom.algorithms.flexlora import FlexLoRA
from fedloom.algorithms.products import mean_product
from fedloom.errors import EmptyCohort, ShapeMismatch
from fedloom.messages import Update
from fedloom.state import AdapterState
from tests.fakes import A, B

SHARES = (0.5, 0.3, 0.2)


def adapters(*, rank: int = 2, rows: int = 9, columns: int = 7, count: int = 3) -> list[AdapterState]:
    stream = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    return [AdapterState({A: draw(rank, columns), B: draw(rows, rank)}) for _ in range(count)]


def product(state: AdapterState) -> torch.Tensor:
    return state[B] @ state[A]


def mean_of(states: list[AdapterState]) -> torch.Tensor:
    return sum((p * product(s) for p, s in zip(SHARES, states, strict=True)), start=torch.zeros(()))


def test_it_is_the_best_of_its_rank_to_the_mean_of_products() -> None:
    states = adapters()
    full = mean_of(states)
    u, s, v = torch.linalg.svd(full, full_matrices=False)
    ours = mean_product(list(zip(SHARES, states, strict=True)))
    assert torch.allclose(product(ours), (u[:, :2] * s[:2]) @ v[:2], atol=1e-12)
    assert torch.allclose(ours[A] @ ours[A].T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ours[B].norm(dim=0), s[:2], atol=1e-12)


def test_it_is_nearer_than_the_mean_of_factors_which_is_off_by_its_cross_terms() -> None:
    states = adapters()
    full = mean_of(states)
    a, b = (
        sum((p * s[x] for p, s in zip(SHARES, states, strict=True)), start=torch.zeros(())) for x in (A, B)
    )
    cross = sum(
        (p * (s[B] - b) @ (s[A] - a) for p, s in zip(SHARES, states, strict=True)), start=torch.zeros(())
    )
    assert torch.allclose(full - b @ a, cross, atol=1e-12)
    ours = mean_product(list(zip(SHARES, states, strict=True)))
    assert (full - product(ours)).norm() < 0.9 * (full - b @ a).norm()


def test_a_sum_of_no_higher_rank_is_exact() -> None:
    [shared, *_] = adapters()
    states = [AdapterState({A: shared[A], B: s[B]}) for s in adapters()]
    ours = mean_product(list(zip(SHARES, states, strict=True)))
    assert torch.allclose(product(ours), mean_of(states), atol=1e-12)


def updates(states: list[AdapterState], start: AdapterState) -> list[Update]:
    names = "abc"
    return [Update(c, {"delta": s - start}, 10 * p) for c, s, p in zip(names, states, SHARES, strict=True)]


def test_the_server_weighs_by_examples_and_by_nothing_else() -> None:
    states = adapters()
    [start] = adapters(count=1)
    algorithm = FlexLoRA()
    before = algorithm.init(start)
    results = [algorithm.server(before, order) for order in itertools.permutations(updates(states, start))]
    expected = mean_product(list(zip(SHARES, states, strict=True)))
    assert {r.adapter.sha256() for r in results} == {results[0].adapter.sha256()}
    assert torch.allclose(product(results[0].adapter), product(expected), atol=1e-12)
    assert results[0].round == 1
    idle = replace(updates(adapters(), start)[0], client="d", weight=0.0)
    assert (
        algorithm.server(before, [*updates(states, start), idle]).adapter.sha256()
        == results[0].adapter.sha256()
    )


def test_one_client_is_what_it_sent() -> None:
    [sent, start] = adapters(count=2)
    after = FlexLoRA().server(FlexLoRA().init(start), [Update("a", {"delta": sent - start}, 3)])
    assert torch.allclose(product(after.adapter), product(sent), atol=1e-12)


def test_nobody_is_told() -> None:
    [start] = adapters(count=1)
    with pytest.raises(EmptyCohort):
        FlexLoRA().server(FlexLoRA().init(start), [Update("a", {"delta": start}, 0)])


def test_an_adapter_with_something_else_is_refused() -> None:
    [start] = adapters(count=1)
    odd = AdapterState({**start, "base_model.model.q.lora_magnitude_vector.weight": torch.ones(3)})
    with pytest.raises(ShapeMismatch, match="lora_magnitude"):
        mean_product([(1.0, odd)])


class Largest(TorchDispatchMode):
    """The most values that any result had."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.values = max(self.values, x.numel())
        return out


def test_nothing_of_a_weights_size_is_built_by_any_aggregator() -> None:
    states = adapters(rows=300, columns=400)
    [start] = adapters(count=1, rows=300, columns=400)
    for aggregate in (
        lambda: FlexLoRA().server(FlexLoRA().init(start), updates(states, start)),
        lambda: weighted_mean(updates(states, start), start.zeros_like()),
    ):
        with Largest() as seen:
            aggregate()
        assert 0 < seen.values <= 400 * 3 * 2  # the factors of the three, side by side
