"""An engine made of workers: each batch of requests goes as a whole to whichever worker is free.

A worker answers a batch just as a single engine would, so results depend neither on the number of workers
nor on which of them was free. Call `answer` from several threads at once: one call keeps one worker busy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import heapify, heappush
from itertools import count
from threading import Condition
from typing import Any, Protocol

from fedloom.engine import letters
from fedloom.engine.loading import Facts
from fedloom.engine.worker import read_reply
from fedloom.errors import RunError
from fedloom.steps import Fit, Score, Tokens

TRIES = 3  # of one batch whose workers die
KEPT = 65_536  # encoded examples
Place = tuple[int, ...]  # in the queue for a worker, the lowest first
STOPPED = "The workers have been stopped."


class WorkerLost(Exception):
    """A worker is gone, along with whatever it was doing."""


class Remote(Protocol):
    """A `Worker` somewhere else."""

    def ask(self, letter: bytes) -> bytes:
        """Raises WorkerLost."""
        ...


class Workers(Protocol):
    """A source of workers."""

    def start(self, number: int) -> Remote:
        """Start worker `number`, which may load for a while yet. Raises RunError if it cannot be started."""
        ...

    def close(self) -> None:
        """End all workers immediately; anyone waiting for an answer gets WorkerLost."""
        ...


class Pool:
    """An `Engine` of several workers; `close` it at the end.

    `encode` is called here, once for each example in use, so that only tokens travel. A worker that dies is
    replaced and its batch is asked again.
    """

    def __init__(self, source: Workers, workers: int, *, encode: Callable[[Any], Tokens]):
        self.workers = workers  # batches answered at the same time
        self._source = source
        self._encode = encode
        self._examples: dict[int, tuple[Any, Tokens]] = {}  # keeps the example, so that its id is not reused
        self._changed = Condition()  # guards all fields below
        self._free = [(number, source.start(number)) for number in reversed(range(workers))]
        self._waiting: list[tuple[Place, int]] = []  # a heap of (place, turn), one for each waiting caller
        self._turns = count()
        self._closed = False

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Like any engine's. Raises RunError if a batch kills three workers, or the pool closes meanwhile."""
        return self.answer_in_turn(requests, place=())

    def ranked(self, place: int) -> Ranked:
        return Ranked(self, (place,))

    def answer_in_turn(self, requests: Mapping[Hashable, Any], *, place: Place) -> dict[Hashable, Any]:
        """Like `answer`, ahead of callers with a higher place; in one place, first come, first served."""
        if not requests:
            return {}
        asked = [self._encoded(request) for request in requests.values()]
        return dict(zip(requests, self._asked(letters.pack(asked), place), strict=True))

    def facts(self) -> Facts:
        """Wait until a worker has loaded the base model. Raises the error that ended the loading."""
        return Facts(**self._asked(letters.pack(None), place=()))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._source.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, letter: bytes, place: Place) -> Any:
        number, worker = self._taken(place)
        try:
            for attempt in range(TRIES):
                if attempt:
                    worker = self._started(number)
                with suppress(WorkerLost):
                    return read_reply(worker.ask(letter))
            worker = self._started(number)
        finally:
            with self._changed:
                self._free.append((number, worker))
                self._changed.notify_all()
        raise RunError(
            f"{TRIES} workers in turn died while they answered the same requests, most likely for lack of memory. "
            "Lower machine.workers, machine.clients_per_batch or machine.tokens_per_pass, and go on with --resume."
        )

    def _taken(self, place: Place) -> tuple[int, Remote]:
        """A free worker, after waiting for one if necessary."""
        with self._changed:
            turn = place, next(self._turns)
            heappush(self._waiting, turn)
            while not self._closed and not (self._free and self._waiting[0] == turn):
                self._changed.wait()
            self._waiting.remove(turn)
            heapify(self._waiting)
            self._changed.notify_all()
            if self._closed:
                raise RunError(STOPPED)
            return self._free.pop()

    def _started(self, number: int) -> Remote:
        """The successor of a worker that died."""
        with self._changed:
            if self._closed:
                raise RunError(STOPPED)
            return self._source.start(number)

    def _encoded(self, request: Any) -> Any:
        if isinstance(request, Fit | Score):
            return replace(request, examples=[self._tokens(example) for example in request.examples])
        return request

    def _tokens(self, example: Any) -> Tokens:
        if isinstance(example, Tokens):
            return example
        with self._changed:
            known = self._examples.pop(id(example), None)
        tokens = known[1] if known else self._encode(example)
        with self._changed:
            self._examples[id(example)] = example, tokens  # the last is the most recent
            if len(self._examples) > KEPT:
                del self._examples[next(iter(self._examples))]
        return tokens


@dataclass(frozen=True)
class Ranked:
    """The same pool for callers with this place in the queue; lower places are served first."""

    pool: Pool
    place: Place

    def ranked(self, place: int) -> Ranked:
        """A place within this one."""
        return Ranked(self.pool, (*self.place, place))

    @property
    def workers(self) -> int:
        return self.pool.workers

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return self.pool.answer_in_turn(requests, place=self.place)
