"""Our reconstruction of FewFedWeight: formulas by hand, and the server's memory of clients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fewfedweight import FewFedWeight, adapted, energy_weights
from fedloom.errors import ConfigError, EmptyCohort
from fedloom.messages import Update
from fedloom.steps import Generate, Score
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.transport.base import Snapshot
from tests.algorithms.talking import Echoing, Equipped, Making, equipped, federate, fits, one_round
from tests.fakes import numbers, say, state


def fewfedweight(*labels: float, **options: Any) -> Equipped:
    relabel = options.pop("relabel", Making([say(x) for x in labels]))
    return equipped(FewFedWeight(**options), relabel=relabel)


def update(client: str, delta: float, loss: float, weight: float = 1.0) -> Update:
    return Update(client, {"delta": state(delta)}, weight, {"own_loss": loss})


def served(algorithm: FewFedWeight, *updates: Update, rounds: int = 1) -> Any:
    server = algorithm.init(state(0.0))
    for _ in range(rounds):
        server = algorithm.server(server, updates)
    return server


def trust(server: Any) -> dict[str, float]:
    return {c: float(w) for c, w in server.slots["client_weights"].items()}


def test_low_energy_weighs_more_and_the_mean_is_one() -> None:
    # exp(0) : exp(-1) over two examples
    weights = energy_weights([2.0, 3.0], tau=1.0)
    assert weights == pytest.approx([2 / (1 + math.exp(-1)), 2 * math.exp(-1) / (1 + math.exp(-1))])
    assert sum(weights) == pytest.approx(2)


def test_a_high_temperature_weighs_all_alike() -> None:
    assert energy_weights([-40.0, 3.0, 900.0], tau=1e9) == pytest.approx([1, 1, 1], rel=1e-5)


def test_an_energy_that_is_no_number_weighs_nothing() -> None:
    assert energy_weights([0.0, math.nan, 0.0], tau=1.0) == [1.5, 0.0, 1.5]
    assert energy_weights([math.nan], tau=1.0) == [0.0]
    assert energy_weights([], tau=1.0) == []


def test_great_energies_do_not_overflow() -> None:
    assert energy_weights([-1e6, 1e6], tau=1e-3) == [2.0, 0.0]


def test_a_client_trains_on_its_own_and_on_pseudo_labels_with_weights() -> None:
    _, engine, _ = one_round(fewfedweight(1.0, 2.0, gamma=0.5), [8.0, 9.0, 7.0])
    [fit] = fits(engine)
    assert [e.response for e in fit.examples] == ["8.0", "9.0", "7.0", "1.0", "2.0"]
    # From 0, energies are 1/2 and 4/2: twice softmax(-0.5, -2), times gamma
    share = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-2))
    assert fit.weights == pytest.approx([1, 1, 1, share, 1 - share])
    assert numbers(fit.adapter) == [0.0, 0.0]


def test_labels_come_from_the_received_model_and_energies_from_the_clients_own() -> None:
    memory: dict[str, Any] = {}
    one_round(fewfedweight(relabel=Echoing()), [8.0], memory=memory)
    own = memory["local"]
    _, engine, _ = one_round(fewfedweight(relabel=Echoing()), [8.0], start=2.0, memory=memory, round=1)
    assert [numbers(r.adapter) for r in engine.of(Generate)] == [[2.0, 2.0]]
    energies, loss = engine.of(Score)
    assert energies.adapter is own
    assert energies.energy
    assert numbers(fits(engine)[0].adapter) == [2.0, 2.0]
    assert loss.adapter is memory["local"]
    assert [e.response for e in loss.examples] == ["8.0"]


def test_a_client_reports_its_loss_on_its_own_examples() -> None:
    update, _, client = one_round(fewfedweight(), [8.0])
    assert numbers(client.memory["local"])[0] == 4.0
    assert update.metrics["own_loss"] == 8.0  # (4 - 8)^2 / 2
    assert numbers(update.delta) == [4.0, 4.0]


def test_one_round_on_the_server_by_hand() -> None:
    # 3 and 1 examples, losses 0 and ln 2: raw 3 and 1/2, scaled to the sum 4: 24/7 and 4/7. Mean (24*1 + 4*8)/28.
    server = served(FewFedWeight(), update("a", 1.0, 0.0, 3), update("b", 8.0, math.log(2), 1))
    assert trust(server) == pytest.approx({"a": 24 / 7, "b": 4 / 7})
    assert numbers(server.adapter) == pytest.approx([2.0])
    assert server.round == 1


def test_weights_go_on_from_round_to_round() -> None:
    # Without examples in play: 1 : 1 becomes 1 : 1/2, then 1 : 1/4, of 2 in all.
    server = served(FewFedWeight(), update("a", 1.0, 0.0), update("b", 8.0, math.log(2)), rounds=2)
    assert trust(server) == pytest.approx({"a": 1.6, "b": 0.4})


def test_an_absent_client_keeps_its_weight_and_taking_part_costs_nothing() -> None:
    algorithm = FewFedWeight()
    server = served(algorithm, update("a", 1.0, 5.0, 2), update("b", 1.0, 5.0, 2), update("c", 1.0, 5.0, 2))
    for _ in range(3):
        server = algorithm.server(server, [update("a", 1.0, 5.0, 2), update("b", 1.0, 5.0, 2)])
    assert trust(server) == pytest.approx({"a": 2, "b": 2, "c": 2})


def test_without_adaptation_the_server_is_that_of_fedavg() -> None:
    updates = [update("a", 1.0, 0.3, 3), update("b", 8.0, 2.0, 1)]
    plain = FedAvg().server(FedAvg().init(state(0.0)), updates)
    assert numbers(served(FewFedWeight(eta=0.0), *updates).adapter) == pytest.approx(numbers(plain.adapter))


def test_the_order_of_arrival_changes_no_bit() -> None:
    updates = [update("a", 0.1, 0.3, 3), update("b", 8.7, 2.0, 1), update("c", 3.3, 1.1, 7)]
    ends = [served(FewFedWeight(), *order, rounds=3) for order in itertools.permutations(updates)]
    assert len({(s.adapter.sha256(), s.slots["client_weights"].sha256()) for s in ends}) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_client_whose_loss_is_no_number_is_left_out_and_keeps_its_weight(loss: float) -> None:
    server = served(FewFedWeight(), update("a", 1.0, 0.5, 3), update("b", 8.0, loss, 2))
    assert numbers(server.adapter) == [1.0]
    assert trust(server) == pytest.approx({"a": 3, "b": 2})


def test_nobody_with_a_loss_is_an_empty_cohort() -> None:
    with pytest.raises(EmptyCohort):
        served(FewFedWeight(), update("a", 1.0, math.nan))
    with pytest.raises(EmptyCohort):
        served(FewFedWeight(), replace(update("a", 1.0, 0.0), metrics={}))


def test_adapted_weights_keep_their_sum() -> None:
    found = adapted({"a": 5.0, "b": 1.0, "c": 2.0}, {"a": 900.0, "b": 1000.0, "c": 901.0}, eta=1.0)
    assert math.fsum(found.values()) == pytest.approx(8.0)
    assert found["a"] > found["c"] > found["b"] >= 0.0


def test_the_servers_memory_survives_a_checkpoint(tmp_path: Any) -> None:
    server = served(FewFedWeight(), update("client/a", 1.0, 0.0, 3), update("b", 8.0, 1.0))
    checkpoint.commit(tmp_path, Checkpoint(server, Snapshot(), {}), fingerprint="x")
    found = checkpoint.newest(tmp_path, fingerprint="x").checkpoint
    assert found is not None
    assert found.state.slots["client_weights"].sha256() == server.slots["client_weights"].sha256()


def test_it_federates() -> None:
    server, clients = federate(fewfedweight(5.0), {"a": [1.0, 2.0], "bb": [6.0]}, rounds=2)
    assert server.round == 2
    assert set(trust(server)) == {"a", "bb"}
    assert all("local" in c.memory for c in clients.values())


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"tau": 0.0}, {"eta": -0.1}, {"tau": math.nan}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        fewfedweight(**options)
