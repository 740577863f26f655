"""The same claims where they count: on the real engine, with a random llama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedmit import FedMIT
from fedloom.algorithms.fedpit import FedPIT
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.fewfedweight import FewFedWeight
from fedloom.algorithms.flexlora import FlexLoRA
from fedloom.client import Client, Tools
from fedloom.engine.lora_engine import LoraEngine
from fedloom.federation import Federation
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, LoraSpec, Score, Steps, Tokens, drive
from fedloom.synthesis.candidates import Candidate, Synthesis
from fedloom.transport import wire
from fedloom.transport.in_process import Simulation
from tests.engine.tiny_models import engine, example, examples, llama, moved
from tests.fakes import everybody

CLIENTS = {"a": examples(7, 1), "bb": examples(3, 2), "ccc": examples(5, 3)}


def contrast(tokens: Tokens) -> tuple[Tokens, Tokens]:
    response = [i for i, labelled in zip(tokens.ids, tokens.labelled, strict=True) if labelled]
    return tokens, Tokens((1, *response), (False,) + (True,) * len(response))


@dataclass(frozen=True)
class Made:
    """Asks for as many answers as the client's name is long; what it makes is fixed."""

    examples: Sequence[Tokens]

    def __call__(
        self, local: Any, adapter: AdapterState, words: Any, *, seed: int, stream: tuple[Any, ...]
    ) -> Steps[Synthesis]:
        for _ in str(stream[0]):
            yield Generate([[1, 5, 7]], adapter, max_new_tokens=3)
        return Synthesis(tuple(map(Candidate, self.examples)))


@pytest.fixture(scope="module")
def real() -> LoraEngine:
    return engine(llama(), path="fast", lora=LoraSpec(rank=4, alpha=8.0, dropout=0.1))


def tools(*made: Tokens) -> Tools:
    return Tools(synthesize=Made(made), contrast=contrast, relabel=Made(made))


SIX = tools(*examples(6, 9))


def federated(
    algorithm: Algorithm, real: LoraEngine, *, width: int, rounds: int = 2, tools: Tools = SIX
) -> ServerState:
    clients = {c: Client(c, own, tools=tools) for c, own in CLIENTS.items()}
    transport = Simulation(algorithm, real, clients, clients_per_batch=width)
    return Federation(algorithm, transport, everybody(clients)).run(
        algorithm.init(real.initial_adapter(0)), rounds
    )


def update(algorithm: Algorithm, real: LoraEngine, own: Sequence[Tokens], start: AdapterState) -> Update:
    [(_, found)] = drive(
        {"a": algorithm.client(Broadcast(1, {"adapter": start}), Client("a", own, tools=SIX))}, real
    )
    return found


def relabelled(own: Sequence[Tokens]) -> list[Tokens]:
    """The same prompts with other responses."""
    return [replace(t, ids=(*t.ids[:-1], 3 + (t.ids[-1] + 1) % 100)) for t in own]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_private_share_of_one_is_fedit_to_the_bit(real: LoraEngine, width: int) -> None:
    pit = FewFedPIT(private_share=1.0, keep=4)
    assert (
        federated(pit, real, width=width).adapter.sha256()
        == federated(FedAvg(), real, width=width).adapter.sha256()
    )


def test_fedpits_upload_does_not_move_one_bit_when_private_responses_change(real: LoraEngine) -> None:
    start, own = moved(real.layout), CLIENTS["a"]
    algorithm = FedPIT()
    one, other = (update(algorithm, real, mine, start) for mine in (own, relabelled(own)[:-1]))
    assert one.delta.sha256() == other.delta.sha256()
    assert wire.pack_update(one) == wire.pack_update(other)
    assert one.delta.norm() > 0


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_fewfedpits_upload_does_move_above_a_share_of_zero(real: LoraEngine, share: float) -> None:
    start, own = moved(real.layout), CLIENTS["a"]
    algorithm = FewFedPIT(private_share=share)
    one, other = (update(algorithm, real, mine, start) for mine in (own, relabelled(own)))
    assert one.delta.sha256() != other.delta.sha256()


@dataclass(frozen=True)
class FixedScores:
    """The engine, but for scores, which are what they are whoever asks."""

    real: LoraEngine

    def answer(self, requests: Any) -> Any:
        scores = {k: replace(r, adapter=None) if isinstance(r, Score) else r for k, r in requests.items()}
        return self.real.answer(scores)


def test_at_a_share_of_zero_the_upload_does_not_move_while_generation_and_scores_are_held(
    real: LoraEngine,
) -> None:
    start, own = moved(real.layout), CLIENTS["a"]
    algorithm = FewFedPIT(private_share=0.0, keep=3)
    one, other = (update(algorithm, FixedScores(real), mine, start) for mine in (own, relabelled(own)))  # type: ignore[arg-type]
    assert one.delta.sha256() == other.delta.sha256()
    assert one.delta.norm() > 0


def test_the_generator_and_both_fits_get_the_received_adapter_and_the_scorer_the_private_one(
    real: LoraEngine,
) -> None:
    start, seen, fitted = moved(real.layout), [], []

    @dataclass(frozen=True)
    class Watched:
        def answer(self, requests: Any) -> Any:
            answers = real.answer(requests)
            seen.extend(requests.values())
            fitted.extend(a.adapter for k, a in answers.items() if isinstance(requests[k], Fit))
            return answers

    update(FewFedPIT(), Watched(), CLIENTS["a"], start)  # type: ignore[arg-type]
    for request in seen:
        expected = fitted[0] if isinstance(request, Score) else start
        assert request.adapter.sha256() == expected.sha256(), type(request).__name__
    assert [type(r) for r in seen] == [Fit, Generate, Score, Fit]


def test_batching_clients_changes_results_by_rounding_only(real: LoraEngine) -> None:
    pit = FewFedPIT(keep=6)
    wide, narrow = (federated(pit, real, width=w, rounds=1).adapter for w in (3, 1))
    assert (wide - narrow).norm() < 1e-3 * (wide - real.initial_adapter(0)).norm()


@pytest.mark.parametrize(
    ("algorithm", "made"),
    [
        (FedMIT(), tools(example(12, 5))),
        (FewFedWeight(), tools(example(12, 5), example(9, 6))),
        (FewFedPIT(), tools()),
        (FedPIT(), tools()),
    ],
)
def test_the_others_run_on_it_too(real: LoraEngine, algorithm: Algorithm, made: Tools) -> None:
    end = federated(algorithm, real, width=2, rounds=2, tools=made)
    assert end.adapter.is_finite()
    assert end.round == 2


def test_flexlora_with_one_client_is_that_clients_own_tuning(real: LoraEngine) -> None:
    start = real.initial_adapter(0)
    sent = update(FedAvg(), real, CLIENTS["a"], start)
    after = FlexLoRA().server(FlexLoRA().init(start), [sent])
    names = [name.removesuffix(".lora_A.weight") for name in start if name.endswith(".lora_A.weight")]
    for name in names:
        own = (start + sent.delta)[name + ".lora_B.weight"] @ (start + sent.delta)[name + ".lora_A.weight"]
        ours = after.adapter[name + ".lora_B.weight"] @ after.adapter[name + ".lora_A.weight"]
        assert float((ours - own).norm()) < 1e-5 * float(own.norm())


def test_flexlora_learns_on_from_its_own_factors(real: LoraEngine) -> None:
    losses = [
        real.answer(
            {
                "all": Score(
                    [*CLIENTS["a"], *CLIENTS["ccc"]], federated(FlexLoRA(), real, width=3, rounds=n).adapter
                )
            }
        )
        for n in (1, 4)
    ]
    early, late = (sum(scored.nll for scored in found["all"]) for found in losses)
    assert late < early
