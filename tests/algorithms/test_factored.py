"""Nothing of size outputs x inputs is ever built on the server: it works on LoRA's factors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.algorithms.base import Algorithm, ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fewfedweight import OWN_LOSS, FewFedWeight
from fedloom.algorithms.local_only import LocalOnly
from fedloom.gate import Gate
from fedloom.messages import Update
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.codec import Codec, Fp32, Int4
from fedloom.transport.downlink import Downlink
from tests.fakes import arrival

INPUTS, OUTPUTS, RANK = 600, 500, 2
FACTORS = RANK * (INPUTS + OUTPUTS)  # 2,200 values; their product has 300,000


class Largest(TorchDispatchMode):
    """The most values that any result of a tensor operation had."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.values = max(self.values, made.numel())
        return made


def factors(seed: int) -> AdapterState:
    chance = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            "m.lora_A.weight": torch.randn(RANK, INPUTS, generator=chance),
            "m.lora_B.weight": torch.randn(OUTPUTS, RANK, generator=chance),
        }
    )


def server_side(algorithm: Algorithm, codec: Codec) -> ServerState:
    """Two rounds: publish, send, receive, admit, aggregate."""
    state, link = algorithm.init(factors(0)), Downlink(codec)
    for r in range(2):
        message = algorithm.broadcast(state, "c")
        link.publish(message.adapter)
        link.pack(message, r - 1 if r else None)
        delta = {name: factors(10) for name in algorithm.expects(message)}
        metrics = {OWN_LOSS: 1.0} if OWN_LOSS in algorithm.reports else {}
        sent = [Update(f"c{i}", delta, 1.0 + i, metrics, round=r) for i in range(3)]
        asked, expected = {u.client: message for u in sent}, algorithm.expects(message)
        arrived = [
            Gate().admit(arrival(back), asked, expected, algorithm.reports, ()).update
            for back in (wire.unpack_update(wire.pack_update(u, codec), codec, expected) for u in sent)
        ]
        state = algorithm.server(state, arrived)
    return state


@pytest.mark.parametrize("make", [FedAvg, LocalOnly, FewFedWeight], ids=["fedavg", "local", "fewfedweight"])
@pytest.mark.parametrize("codec", [Fp32(), Int4()], ids=["fp32", "int4"])
def test_the_server_never_multiplies_the_factors(make: Callable[[], Algorithm], codec: Codec) -> None:
    with Largest() as seen:
        server_side(make(), codec)
    assert 0 < seen.values <= FACTORS


def test_a_product_of_factors_would_be_noticed() -> None:
    one = factors(0)
    with Largest() as seen:
        one["m.lora_B.weight"] @ one["m.lora_A.weight"]
    assert seen.values == INPUTS * OUTPUTS
