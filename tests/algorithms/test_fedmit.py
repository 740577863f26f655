"""FedMIT and local-only tuning on local and synthetic examples: one set, one adapter."""

from __future__ import annotations

from typing import Any

from fedloom.algorithms.fedmit import FedMIT
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.self_augmented import SelfAugmented
from fedloom.steps import Generate, Score
from fedloom.transport import wire
from tests.algorithms.talking import Echoing, Equipped, Making, equipped, federate, fits, one_round
from tests.fakes import A, numbers, say


def fedmit(*made: float, **options: Any) -> Equipped:
    return equipped(FedMIT(**options), synthesize=Making([say(x) for x in made]))


def test_fedmit_trains_one_adapter_on_local_and_selected_examples_together() -> None:
    # The scorer, at 4, keeps 5 and not 1; then 0 -> 4 -> 4.5 or 0 -> 2.5 -> 5.25, as the order has it.
    update, engine, _ = one_round(fedmit(1.0, 5.0, keep=1), [8.0])
    scorer, together = fits(engine)
    assert [e.response for e in together.examples] == ["8.0", "5.0"]
    assert numbers(together.adapter) == numbers(scorer.adapter) == [0.0, 0.0]
    assert numbers(update.delta)[0] in (4.5, 5.25)
    assert update.weight == 1


def test_fedmit_generates_and_selects_as_fewfedpit_does() -> None:
    ours, theirs = (
        one_round(equipped(made, synthesize=Echoing(3)), [8.0, 9.0], start=2.0)[1]
        for made in (FedMIT(keep=2), FewFedPIT(keep=2))
    )
    assert [numbers(r.adapter) for r in ours.of(Generate)] == [
        numbers(r.adapter) for r in theirs.of(Generate)
    ]
    assert [numbers(r.adapter) for r in ours.of(Score)] == [numbers(r.adapter) for r in theirs.of(Score)]
    assert fits(ours)[1].examples[2:] == fits(theirs)[1].examples


def test_fedmit_without_candidates_trains_on_local_examples() -> None:
    update, _, _ = one_round(fedmit(), [8.0])
    assert numbers(update.delta) == [4.0, 4.0]


def test_self_augmentation_tunes_on_local_and_synthetic_examples() -> None:
    update, engine, client = one_round(equipped(SelfAugmented(), synthesize=Making([say(6.0)])), [8.0])
    [fit] = fits(engine)
    assert [e.response for e in fit.examples] == ["8.0", "6.0"]
    assert numbers(client.memory["adapter"])[0] in (5.0, 5.5)
    assert dict(update.states) == {}


def test_self_augmentation_lets_no_tensor_out() -> None:
    update, _, client = one_round(equipped(SelfAugmented(), synthesize=Making([say(6.0)])), [8.0])
    assert client.memory["adapter"][A].numpy().tobytes() not in wire.pack_update(update)


def test_self_augmentation_generates_once_and_goes_on_from_its_own_adapter() -> None:
    memory: dict[str, Any] = {}
    algorithm = equipped(SelfAugmented(), synthesize=Echoing())
    one_round(algorithm, [8.0], start=2.0, memory=memory)
    after = memory["adapter"]
    _, engine, _ = one_round(algorithm, [8.0], start=2.0, memory=memory, round=1)
    assert engine.of(Generate) == []
    [fit] = fits(engine)
    assert fit.adapter is after
    assert [e.response for e in fit.examples] == ["8.0", "2.0"]
    assert fit.seen == 2


def test_self_augmentation_with_nothing_made_is_local_only_to_the_bit() -> None:
    clients = {"a": [1.0, 2.0, 3.0], "b": [4.0]}
    _, ours = federate(equipped(SelfAugmented(), synthesize=Making([])), clients, rounds=3)
    _, theirs = federate(LocalOnly(), clients, rounds=3)
    for c in clients:
        assert ours[c].memory["adapter"].sha256() == theirs[c].memory["adapter"].sha256()


def test_self_augmented_clients_never_see_one_another() -> None:
    clients = {"a": [1.0, 2.0, 3.0], "b": [4.0]}
    algorithm = equipped(SelfAugmented(), synthesize=Echoing(2))
    together = federate(algorithm, clients, rounds=2)[1]
    alone = federate(algorithm, {"a": clients["a"]}, rounds=2)[1]
    assert together["a"].memory["adapter"].sha256() == alone["a"].memory["adapter"].sha256()
