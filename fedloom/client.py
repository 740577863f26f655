"""One data owner: its examples, and a memory that stays with it between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.messages import ClientId
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, LocalTraining, Steps


@dataclass
class Client:
    """`memory` is never sent. It holds AdapterStates and plain JSON values, so that it can be saved."""

    id: ClientId
    examples: Sequence[Any]
    memory: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None  # examples a round; None: `local.epochs` times its examples
    local: LocalTraining = LocalTraining()  # with its schedule across rounds
    seed: int = 0  # of the run

    def fit(
        self,
        adapter: AdapterState,
        *,
        round: int,
        examples: Sequence[Any] | None = None,
        purpose: str = "local",
        **options: Any,
    ) -> Steps[Fitted]:
        """Train on this client's examples, going on in their order where its last round stopped.

        `purpose` names the stream: two jobs of one client (FedPIT) each keep their own order.
        """
        place = f"seen/{purpose}"
        seen = int(self.memory.get(place, 0))
        fitted: Fitted = yield Fit(
            adapter,
            self.examples if examples is None else examples,
            local=self.local.at(round),
            seed=self.seed,
            stream=(self.id, purpose),
            seen=seen,
            limit=self.limit,
            **options,
        )
        self.memory[place] = seen + fitted.examples
        return fitted

    def staged(self) -> Client:
        """A copy whose memory can be thrown away if the round is not committed."""
        return replace(self, memory=dict(self.memory))
