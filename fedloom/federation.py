"""The round loop. Start reading here."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.errors import EmptyCohort, RefusedUpdate
from fedloom.gate import Admitted, Gate
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.transport.base import Transport

# How many updates may wait for their turn. A cohort up to this size is judged as a whole and folded by client
# id. Of a larger one, only this many are held at a time, so the server's memory does not grow with the
# cohort.
WINDOW = 64
STRANGERS = "(not asked)"  # in `Round.refused`, all together: they may be many, and called anything


@dataclass
class Round:
    """What happened in one round, as the server saw it."""

    round: int
    cohort: Sequence[ClientId]
    updates: dict[ClientId, Update] = field(default_factory=dict)  # those used, without their tensors
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
    gate: Gate = Gate()

    def run(self, state: ServerState, rounds: int) -> ServerState:
        """Run until `state.round == rounds`; a checkpoint resumes from its own round."""
        while state.round < rounds:
            cohort = self.select(state.round)
            seen = Round(state.round, cohort)
            sent = {c: self.algorithm.broadcast(state, c) for c in cohort}
            state = self._next(state, seen, self._by_client(self._admitted(sent, seen), seen))
            self.transport.settle(seen.round, seen.updates.keys())
            self.after_round(state, seen)
        return state

    def _next(self, state: ServerState, seen: Round, updates: Iterator[Update]) -> ServerState:
        first = next(updates, None)
        if first is None:
            if seen.cohort:
                raise EmptyCohort(_nobody(seen))
            return state.next(state.adapter)  # Poisson sampling may select nobody
        after = self.algorithm.server(state, chain([first], updates))
        for _ in updates:  # an algorithm may ignore updates, but every client must still do its work
            pass
        return after

    def _admitted(self, sent: Mapping[ClientId, Broadcast], seen: Round) -> Iterator[Admitted]:
        """The updates that pass the gate, in order of arrival."""
        for arrival in self.transport.exchange(sent):
            client = arrival.client
            seen.bytes_up += arrival.bytes_up
            seen.bytes_down += arrival.bytes_down
            expected = self.algorithm.expects(sent[client]) if client in sent else {}
            answered = seen.updates.keys() | seen.refused.keys()
            passed = None
            try:
                passed = self.gate.admit(arrival, sent, expected, self.algorithm.reports, answered)
                seen.updates[client] = replace(passed.update, states={})
            except RefusedUpdate as refusal:
                seen.refused.setdefault(client if client in sent else STRANGERS, refusal.code)
            self.on_update(seen, client)
            if passed is not None:
                yield passed

    def _by_client(self, arriving: Iterator[Admitted], seen: Round) -> Iterator[Update]:
        """Updates sorted by client within the window, without those whose norm is out of proportion.

        Float addition is not associative, and a simulation must repeat to the bit in whatever order updates
        arrive.
        """
        waiting: list[Admitted] = []
        norms: dict[str, list[float]] = {}

        def release() -> Iterator[Update]:
            next_one = waiting.pop(0)
            client = next_one.update.client
            try:
                self.gate.proportionate(next_one, norms)
            except RefusedUpdate as refusal:
                del seen.updates[client]
                seen.refused[client] = refusal.code
            else:
                yield next_one.update

        for admitted in arriving:
            insort(waiting, admitted, key=lambda a: a.update.client)
            if admitted.update.weight > 0:
                for name, norm in admitted.norms.items():
                    norms.setdefault(name, []).extend([norm] if norm > 0 else [])
            if len(waiting) > WINDOW:
                yield from release()
        while waiting:
            yield from release()


def _nobody(seen: Round) -> str:
    codes: Mapping[str, int] = {
        code: list(seen.refused.values()).count(code) for code in seen.refused.values()
    }
    said = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items())) or "none arrived"
    advice = " Training diverged: lower local.learning_rate." if codes.keys() & {"non-finite", "norm"} else ""
    return f"Round {seen.round + 1}: none of {len(seen.cohort)} selected clients returned a usable update ({said}).{advice}"
