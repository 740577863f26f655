"""FewFedPIT against Algorithm 1 of its paper, on an engine whose arithmetic fits on a napkin."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom import lora
from fedloom.algorithms.base import UNSENT
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fewfedpit import FewFedPIT, cross_term, mixed
from fedloom.client import Client
from fedloom.errors import ConfigError
from fedloom.messages import Broadcast
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, Score, drive
from fedloom.transport import wire
from tests.algorithms.talking import (
    Echoing,
    Equipped,
    Making,
    Talking,
    equipped,
    federate,
    fits,
    is_json,
    one_round,
)
from tests.fakes import A, B, numbers, say, state


def fewfedpit(*made: float, **options: Any) -> Equipped:
    synthesize = options.pop("synthesize", Making([say(x) for x in made]))
    return equipped(FewFedPIT(**options), synthesize=synthesize)


def test_one_round_by_hand() -> None:
    # Private: 0 -> 4 towards 8. It is 3 from 1 and 1 from 5, so 5 is kept; public: 0 -> 2.5. Mix: (4 + 2.5) / 2.
    update, _, _ = one_round(fewfedpit(1.0, 5.0, keep=1), [8.0])
    assert numbers(update.delta) == [3.25, 3.25]
    assert update.weight == 1  # real examples only
    assert list(update.states) == ["delta"]


@pytest.mark.parametrize(("share", "delta"), [(0.0, 2.5), (0.3, 2.95), (0.7, 3.55), (1.0, 4.0)])
def test_the_private_share_weighs_private_against_public(share: float, delta: float) -> None:
    # share * 4 + (1 - share) * 2.5
    update, _, _ = one_round(fewfedpit(1.0, 5.0, keep=1, private_share=share), [8.0])
    assert numbers(update.delta) == pytest.approx([delta, delta], rel=1e-6)


def test_both_adapters_are_trained_from_the_received_one() -> None:
    _, engine, _ = one_round(fewfedpit(1.0, 5.0), [8.0], start=2.0)
    private, public = fits(engine)
    assert numbers(private.adapter) == numbers(public.adapter) == [2.0, 2.0]


def test_neither_adapter_survives_the_round() -> None:
    _, _, client = one_round(fewfedpit(1.0), [8.0])
    assert not any(isinstance(value, AdapterState) for value in client.memory.values())


def test_the_generator_is_the_received_adapter() -> None:
    # It says 2.0, where it is; the private adapter would be at 5 and say so.
    _, engine, _ = one_round(fewfedpit(synthesize=Echoing()), [8.0], start=2.0)
    assert [numbers(r.adapter) for r in engine.of(Generate)] == [[2.0, 2.0]]
    assert [e.response for e in fits(engine)[1].examples] == ["2.0"]


def test_the_scorer_is_the_private_adapter() -> None:
    # From 0, the received adapter is nearer to 1 and would keep that; the private one, at 4, keeps 5.
    _, engine, _ = one_round(fewfedpit(1.0, 5.0, keep=1), [8.0])
    assert [numbers(r.adapter) for r in engine.of(Score)] == [[4.0, 4.0]]
    assert [e.response for e in fits(engine)[1].examples] == ["5.0"]


def test_a_client_scores_all_candidates_in_one_request() -> None:
    _, engine, _ = one_round(fewfedpit(1.0, 5.0, 6.0), [8.0])
    [request] = engine.of(Score)
    assert [how for how, _ in request.examples] == ["given"] * 3 + ["alone"] * 3


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("ifs", ["5.0", "2.0"]),
        ("ifd", ["-4.0", "1.0"]),
        ("perplexity", ["5.0", "2.0"]),
        ("first", ["1.0", "-4.0"]),
    ],
)
def test_the_rule_decides_who_is_kept(rule: Any, kept: list[str]) -> None:
    # Distances from the private adapter at 4: 3, 8, 1, 2.
    _, engine, _ = one_round(fewfedpit(1.0, -4.0, 5.0, 2.0, keep=2, rule=rule), [8.0])
    assert [e.response for e in fits(engine)[1].examples] == kept


def test_candidates_that_the_instruction_does_not_help_can_be_dropped() -> None:
    # At 4, a candidate at 20 has a loss of 128 a token after its instruction and 50 alone.
    _, engine, client = one_round(fewfedpit(1.0, 20.0, drop_unhelpful=True), [8.0])
    assert [e.response for e in fits(engine)[1].examples] == ["1.0"]
    assert client.memory[UNSENT]["unhelpful_share"] == 0.5
    assert client.memory[UNSENT]["selected"] == 1


def test_a_share_of_one_is_fedavg_to_the_bit() -> None:
    clients = {"a": [1.0, 2.0, 3.0], "bb": [4.0, 5.0], "ccc": [6.1]}
    one, its = federate(fewfedpit(1.0, 5.0, private_share=1.0), clients, rounds=3)
    other, theirs = federate(FedAvg(), clients, rounds=3)
    assert one.adapter.sha256() == other.adapter.sha256()
    assert {c: its[c].memory["seen/local"] for c in its} == {
        c: theirs[c].memory["seen/local"] for c in theirs
    }


def test_the_private_fit_is_the_very_request_of_fedavg() -> None:
    _, engine, _ = one_round(fewfedpit(1.0), [8.0, 9.0], start=1.0, memory={"seen/local": 6}, round=3)
    _, plain, _ = one_round(FedAvg(), [8.0, 9.0], start=1.0, memory={"seen/local": 6}, round=3)
    one, [other] = fits(engine)[0], fits(plain)
    assert one.adapter.sha256() == other.adapter.sha256()
    assert replace(one, adapter=other.adapter) == other


def test_private_fits_of_a_cohort_are_answered_together_however_long_generation_takes() -> None:
    clients = {"a": [1.0], "bb": [2.0], "ccc": [3.0]}
    given, engine, message = fewfedpit(1.0), Talking(), Broadcast(0, {"adapter": state(0.0)})
    list(
        drive(
            {
                c: given.algorithm.client(message, Client(c, [say(x) for x in xs], tools=given.tools))
                for c, xs in clients.items()
            },
            engine,
        )
    )
    assert [key for key, r in engine.asked[:3] if isinstance(r, Fit)] == ["a", "bb", "ccc"]


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_upload_depends_on_private_responses_above_a_share_of_zero(share: float) -> None:
    one, other = (one_round(fewfedpit(5.0, private_share=share), [x])[0] for x in (8.0, 9.0))
    assert numbers(one.delta) != numbers(other.delta)


def test_at_a_share_of_zero_the_upload_depends_on_private_responses_only_through_the_choice() -> None:
    # With room for all candidates nothing is chosen, but their order follows the scores; one candidate has none.
    one, other = (one_round(fewfedpit(5.0, private_share=0.0), [x])[0] for x in (8.0, 9.0))
    assert one.delta.sha256() == other.delta.sha256()


def test_at_a_share_of_zero_a_diverged_private_adapter_cannot_spoil_the_upload() -> None:
    update, _, client = one_round(fewfedpit(5.0, private_share=0.0), [float("inf")])
    # Nothing could be scored either, so nothing was trained on: the upload is where the round began.
    assert numbers(update.delta) == [0.0, 0.0]
    assert client.memory[UNSENT]["selected"] == 0
    assert client.memory[UNSENT]["unusable"] == 1


def test_without_usable_candidates_the_public_adapter_is_the_received_one() -> None:
    update, engine, client = one_round(fewfedpit(), [8.0], start=2.0)
    assert len(fits(engine)) == 1
    assert engine.of(Score) == []
    assert numbers(update.delta) == [1.5, 1.5]  # half of 2 -> 5
    assert client.memory[UNSENT]["synthetic/kept"] == 0


def test_how_many_candidates_met_which_fate_stays_with_the_client() -> None:
    update, _, client = one_round(fewfedpit(1.0, 5.0), [8.0])
    assert set(update.metrics) == {"loss", "steps", "tokens"}
    counts = {
        k.removeprefix("synthetic/"): v
        for k, v in client.memory[UNSENT].items()
        if k.startswith("synthetic/")
    }
    assert counts == {"generated": 3, "kept": 2, "failed/empty": 1, "repeated": 0}


def test_no_word_of_a_synthetic_example_leaves_the_client() -> None:
    algorithm = fewfedpit(synthesize=Making([replace(say(5.0), instruction="Aardvark", context="Bandicoot")]))
    update, _, client = one_round(algorithm, [8.0])
    assert "Aardvark" in json.dumps(client.memory)
    assert b"Aardvark" not in wire.pack_update(update)
    assert b"Bandicoot" not in wire.pack_update(update)


def test_memory_is_plain_json() -> None:
    _, _, client = one_round(fewfedpit(1.0, 5.0), [8.0])
    assert is_json(client.memory)


def test_a_client_that_was_resumed_goes_on_as_if_it_had_not_been() -> None:
    algorithm = fewfedpit(1.0, 5.0, 6.0, every=2)
    _, _, client = one_round(algorithm, [8.0, 9.0])
    restored = json.loads(json.dumps(client.memory))
    on, engine, _ = one_round(algorithm, [8.0, 9.0], start=3.0, memory=client.memory, round=1)
    again, resumed, _ = one_round(algorithm, [8.0, 9.0], start=3.0, memory=restored, round=1)
    assert engine.of(Generate) == resumed.of(Generate) == []  # both use what round 0 made
    assert on.delta.sha256() == again.delta.sha256()
    assert on.metrics == again.metrics


@pytest.mark.parametrize(("every", "rounds"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (0, [0])])
def test_examples_are_made_anew_every_so_many_rounds(every: int, rounds: list[int]) -> None:
    algorithm, memory, asked = fewfedpit(5.0, every=every), {}, []
    for round in range(4):
        _, engine, _ = one_round(algorithm, [8.0], memory=memory, round=round)
        asked += [round for _ in engine.of(Generate)]
    assert asked == rounds


def test_every_round_names_its_own_streams() -> None:
    memory: dict[str, Any] = {}
    streams = []
    for round in range(2):
        _, engine, _ = one_round(fewfedpit(5.0), [8.0], memory=memory, round=round)
        streams += [fits(engine)[1].stream, engine.of(Generate)[0].stream]
    assert len(set(streams)) == 4


def test_the_batch_width_changes_no_bit() -> None:
    clients = {"a": [1.0, 2.0], "bb": [4.0, 5.0], "ccc": [6.0]}
    ends = {
        federate(fewfedpit(1.0, 5.0, 3.0, keep=2), clients, width=w)[0].adapter.sha256() for w in (1, 2, 3)
    }
    assert len(ends) == 1


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="private_share"):
        fewfedpit(private_share=share)


def test_the_ends_of_the_mix_are_the_adapters_themselves() -> None:
    odd, broken = state(-0.0, 1.0), state(float("inf"), float("nan"))
    assert mixed(odd, broken, 1.0) is odd
    assert mixed(broken, odd, 0.0) is odd


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_cross_term_is_what_mixing_factors_adds_to_mixing_products(share: float) -> None:
    torch.manual_seed(0)
    one, other = (
        AdapterState(
            {
                A: torch.randn(2, 5),
                B: torch.randn(4, 2),
                "v.lora_A.weight": torch.randn(2, 3),
                "v.lora_B.weight": torch.randn(6, 2),
            }
        )
        for _ in range(2)
    )

    def product(s: AdapterState) -> torch.Tensor:
        return torch.cat([(b @ a).flatten() for a, b in lora.pairs(s).values()])

    both = product(mixed(one, other, share))
    added = share * product(one) + (1 - share) * product(other) - both
    assert cross_term(one, other, share) == pytest.approx(
        float(added.norm() / both.norm()), rel=1e-4, abs=1e-6
    )
