"""One worker of a pool: an engine whose requests and answers are letters (letters.py)."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fedloom import errors
from fedloom.engine import letters, loading
from fedloom.engine.loading import Facts, Setup
from fedloom.errors import FedloomError, RunError
from fedloom.steps import Engine, Tokens

T = TypeVar("T")


def pack_setup(setup: Setup) -> bytes:
    return letters.pack({name: getattr(setup, name) for name in setup.__dataclass_fields__})


def read_setup(letter: bytes) -> Setup:
    return Setup(**letters.unpack(letter))


def read_reply(letter: bytes) -> Any:
    """The answers, or the facts. Raises the worker's error: fedloom's own as it is, any other as RunError."""
    reply: dict[str, Any] = letters.unpack(letter)
    if "error" not in reply:
        return reply["answer"]
    kind = getattr(errors, reply["error"], RunError)
    raise kind(reply["message"])


class Worker:
    """Loads the base model once. If loading fails, every letter is answered with the reason."""

    def __init__(self, setup: bytes):
        self._loaded = _attempt(lambda: loading.load(read_setup(setup), _tokens))

    def reply(self, letter: bytes) -> bytes:
        """Reply to a list of requests with their answers, to None with the engine's facts."""

        def answer() -> Any:
            engine, facts = self._loaded()
            return _answer(engine, facts, letters.unpack(letter))

        try:
            return letters.pack({"answer": _attempt(answer)()})
        except FedloomError as error:
            return letters.pack({"error": type(error).__name__, "message": str(error)})

    def close(self) -> None:
        """End what the engine has started."""
        with suppress(FedloomError):  # where nothing was loaded
            self._loaded()[0].close()


def _answer(engine: Engine, facts: Facts, requests: list[Any] | None) -> Any:
    if requests is None:
        return asdict(facts)
    return list(engine.answer(dict(enumerate(requests))).values())


def _tokens(example: Tokens) -> Tokens:
    """Return the example as it is: examples are encoded before they are sent."""
    return example


def _attempt(act: Callable[[], T]) -> Callable[[], T]:
    """Capture what `act` returns or raises, to be returned or raised later."""
    try:
        found = act()
    except FedloomError as error:
        return _raising(error)
    except Exception as error:  # the message may quote training text, so only type and place are reported
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        said = f"A worker failed with {type(error).__name__} at {place}. This is a bug in fedloom."
        return _raising(RunError(said))
    return lambda: found


def _raising(error: FedloomError) -> Callable[[], Any]:
    def again() -> Any:
        raise error

    return again
