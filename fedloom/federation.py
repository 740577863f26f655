"""The round loop. Start reading here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.errors import EmptyCohort, RefusedUpdate
from fedloom.gate import admit
from fedloom.messages import ClientId, Update
from fedloom.transport.base import Transport


@dataclass
class Round:
    """What happened in one round, as the server saw it."""

    round: int
    cohort: Sequence[ClientId]
    updates: dict[ClientId, Update] = field(default_factory=dict)
    refused: dict[ClientId, str] = field(default_factory=dict)  # client -> reason code
    bytes_up: int = 0
    bytes_down: int = 0


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Federation:
    algorithm: Algorithm
    transport: Transport
    select: Callable[[int], Sequence[ClientId]]  # round -> cohort
    after_round: Callable[[ServerState, Round], None] = _ignore  # evaluate, checkpoint, log
    on_update: Callable[[Round, ClientId], None] = _ignore  # progress

    def run(self, state: ServerState, rounds: int) -> ServerState:
        """Run until `state.round == rounds`; a checkpoint resumes from its own round."""
        while state.round < rounds:
            cohort = self.select(state.round)
            broadcasts = {c: self.algorithm.broadcast(state, c) for c in cohort}
            seen = Round(state.round, cohort)
            for delivery in self.transport.exchange(broadcasts):
                client = delivery.update.client
                seen.bytes_up += delivery.bytes_up
                seen.bytes_down += delivery.bytes_down
                try:
                    seen.updates[client] = admit(delivery.update, broadcasts[client], seen.updates)
                except RefusedUpdate as refusal:
                    seen.refused[client] = refusal.code
                self.on_update(seen, client)
            state = self._next(state, seen)
            self.after_round(state, seen)
        return state

    def _next(self, state: ServerState, seen: Round) -> ServerState:
        if not seen.cohort:
            return state.next(state.adapter)  # Poisson sampling may select nobody
        if not seen.updates:
            raise EmptyCohort(_nobody(seen))
        return self.algorithm.server(state, seen.updates.values())


def _nobody(seen: Round) -> str:
    codes: Mapping[str, int] = {
        code: list(seen.refused.values()).count(code) for code in seen.refused.values()
    }
    said = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items())) or "none arrived"
    advice = " Training diverged: lower local.learning_rate." if "non-finite" in codes else ""
    return f"Round {seen.round + 1}: none of {len(seen.cohort)} selected clients returned a usable update ({said}).{advice}"
