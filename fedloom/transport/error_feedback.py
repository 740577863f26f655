"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what rounding removed is sent the next time.

A client adds to each delta what its last upload lacked, so the sum of its uploads differs from the sum of its
deltas by one rounding, after any number of rounds. The residual, one state the size of an adapter, waits at
the client's end until its next turn; with low participation it is stale and can hurt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedloom.messages import Update
from fedloom.state import AdapterState

Residual = Mapping[str, AdapterState]  # by the names of an update's states


def add_residual(update: Update, owed: Residual) -> Update:
    states = {name: state + owed[name] if name in owed else state for name, state in update.states.items()}
    return replace(update, states=states)


def residual(meant: Update, arrived: Update) -> dict[str, AdapterState]:
    """`meant` minus `arrived`. States that diverged are left out, so that their old residual stays."""
    lacking = {name: state - arrived.states[name] for name, state in meant.states.items()}
    return {name: state for name, state in lacking.items() if state.is_finite()}
