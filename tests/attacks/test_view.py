"""Each position sees what its view holds."""

from __future__ import annotations

import pytest

from fedloom.algorithms.fedavg import FedAvg
from fedloom.attacks.view import ServerView, aggregated, upload
from fedloom.client import Client
from fedloom.messages import Broadcast, Update
from tests.fakes import ToyEngine, numbers, state

MESSAGE = Broadcast(3, {"adapter": state(0.0, 0.0)})


def seen(client: str, value: float, weight: float) -> ServerView:
    return ServerView(MESSAGE, Update(client, {"delta": state(value)}, weight, {"loss": 1.0}))


def test_an_upload_is_what_the_client_sends_in_a_round() -> None:
    view = upload(FedAvg(), MESSAGE, Client("c", [4.0]), ToyEngine())
    assert view.adapter is MESSAGE.adapter
    assert numbers(view.delta) == [2.0, 2.0]  # 0 - 0.5 (0 - 4)
    assert (view.update.client, view.update.weight) == ("c", 1)


def test_making_an_upload_leaves_the_client_as_it_was() -> None:
    client = Client("c", [4.0, 2.0], memory={"seen/local": 1})
    upload(FedAvg(), MESSAGE, client, ToyEngine())
    assert client.memory == {"seen/local": 1}


def test_two_uploads_of_one_client_are_the_same() -> None:
    client = Client("c", [4.0, 2.0, 7.0])
    one, other = (upload(FedAvg(), MESSAGE, client, ToyEngine()) for _ in range(2))
    assert one.delta.sha256() == other.delta.sha256()


def test_behind_secure_aggregation_only_the_weighted_mean_is_seen() -> None:
    mean = aggregated([seen("a", 1.0, 3), seen("b", 5.0, 1)])
    assert numbers(mean.delta) == [2.0]  # (3*1 + 1*5) / 4
    assert mean.update.weight == 4
    assert mean.update.metrics == {}


def test_updates_of_different_rounds_do_not_aggregate() -> None:
    later = ServerView(Broadcast(4, {"adapter": state(0.0, 0.0)}), Update("b", {"delta": state(1.0)}, 1))
    with pytest.raises(ValueError, match="one broadcast"):
        aggregated([seen("a", 1.0, 1), later])
