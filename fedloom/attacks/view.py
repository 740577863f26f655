"""The view of an adversary in each position. An attack gets a view and nothing else of the training.

Everybody knows the base model, its tokenizer, the prompt format and the settings of the run: they are
public, and attacks get them as arguments. A view holds everything that depends on anyone's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.algorithms.aggregators import weighted_mean
from fedloom.algorithms.base import Algorithm
from fedloom.client import Client
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.steps import Engine, drive


@dataclass(frozen=True)
class ServerView:
    """The honest-but-curious server, one client, one round: the two messages exchanged.

    It sees all of their fields, the client's id, weight and metrics included. It does not see
    the client's examples, its memory, its synthetic examples or any adapter that the client keeps.
    """

    broadcast: Broadcast
    update: Update

    @property
    def adapter(self) -> AdapterState:
        """The adapter that the client started from."""
        return self.broadcast.adapter

    @property
    def delta(self) -> AdapterState:
        return self.update.delta


def upload(algorithm: Algorithm, message: Broadcast, client: Client, engine: Engine) -> ServerView:
    """One honest client's answer to `message`, as the server receives it. Its memory is unchanged."""
    [(_, update)] = drive({client.id: algorithm.client(message, client.staged())}, engine)
    return ServerView(message, update)


def aggregated(views: Sequence[ServerView]) -> ServerView:
    """The view that secure aggregation leaves the server: the weighted mean alone.

    Metrics of single clients are gone. Raises: ValueError if the views are not of one broadcast.
    """
    first = views[0]
    if len({(view.broadcast.round, view.adapter.sha256()) for view in views}) > 1:
        raise ValueError("Expected views of one broadcast; deltas from different starts have no mean.")
    mean = weighted_mean([view.update for view in views], first.adapter.zeros_like())
    weight = sum(view.update.weight for view in views)
    return ServerView(first.broadcast, Update("aggregate", mean, weight))
