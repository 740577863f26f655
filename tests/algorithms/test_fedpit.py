"""FedPIT v1: what leaves is a function of the synthetic examples alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fedloom.algorithms.base import UNSENT
from fedloom.algorithms.fedpit import FedPIT
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.client import Client, Tools
from fedloom.federation import Federation
from fedloom.messages import Broadcast
from fedloom.state import AdapterState
from fedloom.steps import Generate, Score, Steps
from fedloom.synthesis.candidates import Candidate, Synthesis
from fedloom.transport import wire
from fedloom.transport.codec import Bf16, Fp32, Int4
from fedloom.transport.in_process import Simulation
from tests.algorithms.talking import Echoing, Equipped, Making, Talking, equipped, federate, fits, one_round
from tests.fakes import A, everybody, numbers, say, state, value


@dataclass(frozen=True)
class Comparing:
    """A synthesizer whose examples are fixed, while what it drops, how often and why depends on the client's own."""

    examples: Sequence[Any]

    def __call__(
        self, local: Sequence[Any], adapter: AdapterState, words: Any, *, seed: int, stream: tuple[Any, ...]
    ) -> Steps[Synthesis]:
        yield Generate([[1]], adapter, stream=stream)
        dropped = [Candidate(e, "filtered/copy" if value(e) > 7 else "filtered/near-example") for e in local]
        return Synthesis((*dropped, *map(Candidate, self.examples)))


def fedpit(*made: float, **options: Any) -> Equipped:
    synthesize = options.pop("synthesize", Making([say(x) for x in made]))
    return equipped(FedPIT(**options), synthesize=synthesize)


def test_one_round_by_hand() -> None:
    # Public, on 6 alone: 0 -> 3. Private, on local 8 and synthetic 6 in some order: 0 -> 4 -> 5 or 0 -> 3 -> 5.5.
    update, _, client = one_round(fedpit(6.0), [8.0])
    assert numbers(update.delta) == [3.0, 3.0]
    assert numbers(client.memory["personal"])[0] in (5.0, 5.5)
    assert update.weight == 1
    assert list(update.states) == ["delta"]


@pytest.mark.parametrize("private", [0.0, 7.0, 1e6])
def test_given_the_synthetic_examples_an_upload_does_not_move_one_bit_when_private_ones_change(
    private: float,
) -> None:
    one, other = (one_round(fedpit(6.0, 5.0), [x, x])[0] for x in (8.0, private))
    assert wire.pack_update(one) == wire.pack_update(other)  # tensors, weight and metrics


LOSSY = [Fp32(), Bf16(error_feedback=True), Int4(error_feedback=True)]


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("made", [[], [6.0], [6.0, 5.0, 1.5]], ids=len)
def test_no_byte_that_clients_send_tells_how_many_private_examples_there_are_or_what_was_dropped(
    made: list[float], codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(private: dict[str, list[float]]) -> list[bytes]:
        packed: list[bytes] = []

        def weighed(*args: Any, **options: Any) -> bytes:
            packed.append(pack(*args, **options))
            return packed[-1]

        with monkeypatch.context() as patch:
            patch.setattr(wire, "pack_update", weighed)
            algorithm, tools = FedPIT(), Tools(synthesize=Comparing([say(x) for x in made]))
            clients = {c: Client(c, [say(x) for x in xs], tools=tools) for c, xs in private.items()}
            transport = Simulation(algorithm, Talking(), clients, codec=codec)
            Federation(algorithm, transport, everybody(clients)).run(algorithm.init(state(0.0, 0.0)), 3)
        assert {c.memory[UNSENT]["synthetic/generated"] for c in clients.values()} == {
            len(made) + len(xs) for xs in private.values()
        }
        return packed

    pack = wire.pack_update
    one, other = sent({"a": [8.0], "b": [1.0, 2.0]}), sent({"a": [3.0, 4.0, 9.0], "b": [1e6]})
    assert len(one) == 6
    assert one == other


def test_where_nobody_has_a_synthetic_example_the_model_stays_as_it_is() -> None:
    end, clients = federate(fedpit(), {"a": [8.0], "b": [1.0, 2.0]})
    assert (end.round, numbers(end.adapter)) == (2, [0.0, 0.0])
    assert numbers(clients["a"].memory["personal"]) != [0.0, 0.0]  # that is learnt all the same


def test_a_client_weighs_as_much_as_it_has_synthetic_examples() -> None:
    # Client "a" makes one example, at 6, and moves to 3; without examples "bb" stays at 0 and has no say.
    @dataclass(frozen=True)
    class Unequal:
        def __call__(
            self,
            local: Sequence[Any],
            adapter: AdapterState,
            words: Any,
            *,
            seed: int,
            stream: tuple[Any, ...],
        ) -> Steps[Synthesis]:
            yield Generate([[1]], adapter, stream=stream)
            return Synthesis((Candidate(say(6.0)),) if stream[0] == "a" else ())

    end, _ = federate(fedpit(synthesize=Unequal()), {"a": [8.0], "bb": [1.0, 2.0, 3.0]}, rounds=1)
    assert numbers(end.adapter) == [3.0, 3.0]


def test_an_upload_of_fewfedpit_does_move() -> None:
    algorithm = equipped(FewFedPIT(), synthesize=Making([say(6.0), say(5.0)]))
    one, other = (one_round(algorithm, [x, x])[0] for x in (8.0, 7.0))
    assert one.delta.sha256() != other.delta.sha256()


def test_the_upload_starts_from_the_received_adapter_in_every_round() -> None:
    _, engine, _ = one_round(fedpit(6.0), [8.0], start=2.0, memory={"personal": state(9.0, 9.0)}, round=3)
    private, public = fits(engine)
    assert numbers(public.adapter) == [2.0, 2.0]
    assert numbers(private.adapter) == [9.0, 9.0]


def test_the_private_adapter_goes_on_from_round_to_round_on_local_and_synthetic_examples() -> None:
    memory: dict[str, Any] = {}
    one_round(fedpit(6.0), [8.0], memory=memory)
    after_one: AdapterState = memory["personal"]
    _, engine, _ = one_round(fedpit(6.0), [8.0], start=1.0, memory=memory, round=1)
    private = fits(engine)[0]
    assert private.adapter is after_one
    assert sorted(e.response for e in private.examples) == ["6.0", "8.0"]


def test_no_value_of_the_private_adapter_leaves_the_client() -> None:
    update, _, client = one_round(fedpit(6.0), [8.0])
    assert client.memory["personal"][A].numpy().tobytes() not in wire.pack_update(update)


def test_the_generator_is_the_received_adapter() -> None:
    _, engine, _ = one_round(
        fedpit(synthesize=Echoing()), [8.0], start=2.0, memory={"personal": state(9.0, 9.0)}, round=1
    )
    assert [numbers(r.adapter) for r in engine.of(Generate)] == [[2.0, 2.0]]
    assert [e.response for e in fits(engine)[1].examples] == ["2.0"]


def test_nothing_is_scored() -> None:
    assert one_round(fedpit(6.0), [8.0])[1].of(Score) == []


def test_without_synthetic_examples_nothing_is_learnt_from_the_client() -> None:
    update, _, client = one_round(fedpit(), [8.0], start=2.0)
    assert numbers(update.delta) == [0.0, 0.0]
    assert "loss" not in update.metrics
    assert numbers(client.memory["personal"]) == [5.0, 5.0]


def test_a_client_that_was_resumed_goes_on_as_if_it_had_not_been() -> None:
    algorithm = fedpit(6.0, 5.0, 7.0, every=0)
    _, _, client = one_round(algorithm, [8.0, 9.0])
    private = client.memory["personal"]
    restored = {
        **json.loads(json.dumps({k: v for k, v in client.memory.items() if v is not private})),
        "personal": private,
    }
    on = one_round(algorithm, [8.0, 9.0], start=1.0, memory=client.memory, round=1)
    again = one_round(algorithm, [8.0, 9.0], start=1.0, memory=restored, round=1)
    assert wire.pack_update(on[0]) == wire.pack_update(again[0])
    assert on[2].memory["personal"].sha256() == again[2].memory["personal"].sha256()


def test_a_broadcast_carries_the_adapter_alone() -> None:
    algorithm = FedPIT()
    message = algorithm.broadcast(algorithm.init(state(1.0)), "a")
    assert isinstance(message, Broadcast)
    assert list(message.states) == ["adapter"]
