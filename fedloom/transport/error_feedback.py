"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what rounding took away is sent the next time.

A client adds to each delta what its last upload lacked, so all it ever sent differs from all it ever learnt
by one rounding, however many rounds. What is lacking waits in the client's memory, one state the size of an
adapter, and is as old as the client's last turn: where few of many are selected, it can do harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedloom.messages import Update

OWED = "owed:"  # in a client's memory, with the state's name


def with_what_is_owed(update: Update, memory: Mapping[str, Any]) -> Update:
    states = {
        name: state + memory[OWED + name] if OWED + name in memory else state
        for name, state in update.states.items()
    }
    return replace(update, states=states)


def still_owed(meant: Update, arrived: Update) -> dict[str, Any]:
    """For the memory: what of `meant` is not in `arrived`; nothing where training diverged, so old debts stay."""
    lacking = {OWED + name: state - arrived.states[name] for name, state in meant.states.items()}
    return {key: state for key, state in lacking.items() if state.is_finite()}
