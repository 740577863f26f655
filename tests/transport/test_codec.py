"""A codec loses what it says and no more; foreign bytes are refused; what is reported is what would travel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.errors import ConfigError, RefusedUpdate
from fedloom.experiment.listener import Listener
from fedloom.experiment.machine import load_machine
from fedloom.experiment.plan import NAMED, plan
from fedloom.experiment.simulation import Simulated
from fedloom.experiment.toml import load
from fedloom.federation import Federation, Round
from fedloom.gate import Gate
from fedloom.messages import Broadcast, Update
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, journal
from fedloom.transport import blocks, wire
from fedloom.transport.codec import Bf16, Codec, Fp32, Int4, Int8
from fedloom.transport.downlink import Downlink
from fedloom.transport.error_feedback import add_residual, residual
from fedloom.transport.in_process import Simulation
from tests.fakes import FOUR, ToyEngine, arrival, everybody, numbers, state, training

LOSSY = [Bf16(), Int8(), Int8(zstd=False), Int4(), Int4(zstd=False, levels=7)]
SHAPES = [
    (3, 5),
    (1,),
    (0, 4),
    (64,),
    (2, 130),
    (7, 11),
]  # odd, single, empty, whole blocks, more than one, short ends


def names(codec: Any) -> str:
    return codec.label.replace(" ", ",") or "fp32"


def some(seed: int = 0, scale: float = 1e-3) -> AdapterState:
    chance = torch.Generator().manual_seed(seed)
    return AdapterState({f"t{i}": scale * torch.randn(s, generator=chance) for i, s in enumerate(SHAPES)})


def there_and_back(codec: Codec, sent: AdapterState) -> AdapterState:
    update = Update("c", {"delta": sent}, 1.0)
    return wire.unpack_update(wire.pack_update(update, codec), codec, {"delta": sent.zeros_like()}).delta


def in_blocks(t: torch.Tensor, block: int) -> list[torch.Tensor]:
    return list(t.flatten().split(block)) if t.numel() else []


# --- what is lost --------------------------------------------------------------------------------------------


def test_fp32_is_to_the_bit_what_was_sent_and_says_nothing_of_codecs() -> None:
    update = Update("c", {"delta": some()}, 2, {"loss": 0.5})
    data = wire.pack_update(update)
    body = data[wire.CHECKSUM :]
    header = json.loads(
        json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["fedloom"]
    )
    assert header == {
        "schema": 2,
        "states": ["delta"],
        "kind": "update",
        "round": 0,
        "client": "c",
        "weight": 2,
        "metrics": {"loss": 0.5},
    }
    assert wire.unpack_update(data, Fp32()).delta.sha256() == update.delta.sha256()


def test_bf16_rounds_to_nearest_even() -> None:
    sent = state(1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8 - 2**-20)  # steps from 1 to 2 are 2^-7
    assert numbers(there_and_back(Bf16(), sent)) == [1.0, 1.0, 1.0 + 2**-6, -1.0 - 2**-7]


MAX = torch.finfo(torch.float32).max
small, tiny = st.floats(-1e6, 1e6, width=32), st.floats(-(2.0**-116), 2.0**-116, width=32)
finite = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    small,
    tiny,
    st.sampled_from([0.0, MAX, -MAX, 3.4e38]),
)
BLOCKS = pytest.mark.parametrize(
    ("codec", "levels"),
    [(Int8(block=16), 127), *((Int4(block=16, levels=n), n) for n in (1, 2, 5, 7))],
    ids=str,
)


@given(arrays("float32", st.integers(1, 200), elements=finite))
@settings(max_examples=150, deadline=None)
@BLOCKS
def test_a_value_is_off_by_half_a_step_of_its_block_at_most(codec: Any, levels: int, values: Any) -> None:
    x = torch.from_numpy(values)
    back = there_and_back(codec, AdapterState({"w": x}))["w"]
    for sent, got in zip(in_blocks(x, 16), in_blocks(back, 16), strict=True):
        step = max(float(sent.abs().max()) / levels, blocks.SMALLEST)
        # float32 rounds x / step to 2^-18 of a step, and the step itself to 2^-24 of it
        assert (got.double() - sent.double()).abs().max() <= step / 2 * (1 + 2**-16)


@BLOCKS
def test_half_a_step_is_kept_wherever_the_largest_lies_between_two_powers_of_two(
    codec: Any, levels: int
) -> None:
    largest = torch.linspace(1, 2, 4001)[:, None]
    x = torch.cat([largest, largest * torch.linspace(-1, 1, 15)], 1).flatten()  # a block each
    off = (there_and_back(codec, AdapterState({"w": x}))["w"] - x).double().view(-1, 16).abs().amax(1)
    assert float((off * levels / largest.double()[:, 0]).max()) <= 0.5 * (1 + 2**-16)


@pytest.mark.parametrize("codec", LOSSY, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_numbers_stay_finite(codec: Codec, dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, MAX)
    sent = torch.tensor([largest, -largest, 0.99999 * largest, largest / 2, 0.0], dtype=torch.float64).to(
        dtype
    )
    back = there_and_back(codec, AdapterState({"w": sent}))["w"]
    assert back.dtype == dtype
    assert (back.double() - sent.double()).abs().max() <= 0.11 * largest


@given(arrays("float32", st.integers(1, 50), elements=finite))
@settings(max_examples=150, deadline=None)
def test_bf16_is_off_by_a_256th_at_most(values: Any) -> None:
    x = torch.from_numpy(values).double()
    back = there_and_back(Bf16(), AdapterState({"w": x.float()}))["w"].double()
    assert bool(((back - x).abs() <= (x.abs() / 256).clamp_min(2.0**-134)).all())


def test_the_largest_of_a_block_is_the_last_step() -> None:
    sent = torch.tensor([7.0, -7.0, 3.4, 3.6])  # steps of 1
    assert there_and_back(Int4(levels=7), AdapterState({"w": sent}))["w"].tolist() == [7.0, -7.0, 3.0, 4.0]


def test_each_block_has_its_own_scale() -> None:
    sent = torch.cat([torch.full((64,), 1e-6), torch.full((64,), 1e3)])
    back = there_and_back(Int4(), AdapterState({"w": sent}))["w"]
    assert torch.allclose(back, sent, rtol=2**-8)


def test_no_block_spans_two_tensors() -> None:
    sent = AdapterState({"a": torch.full((3,), 1e-6), "b": torch.full((3,), 1e3)})
    assert torch.allclose(there_and_back(Int4(), sent)["a"], sent["a"], rtol=2**-8)


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_zeros_stay_zeros(codec: Codec) -> None:
    assert there_and_back(codec, some().zeros_like()).norm() == 0


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_names_and_shapes_come_back_and_so_do_empty_tensors(codec: Codec) -> None:
    back = there_and_back(codec, some())
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in some().items()
    }


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_an_update_without_states_or_tensors_travels(codec: Codec) -> None:
    assert there_and_back(codec, AdapterState({})).numel() == 0
    assert wire.unpack_update(wire.pack_update(Update("c", {}, 3), codec), codec).states == {}


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=names)
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 2.0**-126, 1e-37])
def test_subnormal_numbers_come_back_as_good_as_zero(codec: Codec, tiny: float) -> None:
    sent = AdapterState({"w": torch.tensor([tiny, -tiny, tiny / 3])})
    assert (there_and_back(codec, sent)["w"] - sent["w"]).abs().max() <= max(tiny * 0.1001, 2.0**-127)


@pytest.mark.parametrize("codec", LOSSY, ids=names)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_the_gate_sees_what_is_no_number(codec: Codec, odd: float) -> None:
    sent = some()
    sent["t3"][5] = odd
    update = Update("c", {"delta": there_and_back(codec, sent)}, 1.0)
    with pytest.raises(RefusedUpdate) as refused:
        Gate().admit(arrival(update), {"c": Broadcast(0, {"adapter": sent})}, {"delta": sent}, (), ())
    assert refused.value.code == "non-finite"


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_double_precision_comes_back_as_such(codec: Codec) -> None:
    assert there_and_back(codec, some().to(torch.float64))["t0"].dtype == torch.float64


def test_what_lies_across_chunks_is_coded_like_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = some()
    whole = {names(c): there_and_back(c, sent).sha256() for c in LOSSY}
    monkeypatch.setattr(blocks, "CHUNK", 64)
    assert {names(c): there_and_back(c, sent).sha256() for c in LOSSY} == whole


@pytest.mark.parametrize("codec", LOSSY, ids=names)
def test_coding_what_was_decoded_gives_the_same_values(codec: Codec) -> None:
    once = there_and_back(codec, some())
    assert (there_and_back(codec, once) - once).norm() <= 2**-8 * once.norm()


# --- how many bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Bf16(), 16), (Int8(zstd=False), 8 + 16 / 256), (Int4(zstd=False), 4 + 16 / 64)],
    ids=["bf16", "int8", "int4"],
)
def test_size_is_that_of_codes_and_scales(codec: Codec, bits: float) -> None:
    n = 1 << 14
    parts = codec.encode(AdapterState({"w": torch.randn(n)}))
    assert sum(t.numel() * t.element_size() for t in parts.values()) == n * bits / 8


def test_int4_with_zstd_is_a_ninth_of_a_bell_curve() -> None:
    n = 1 << 18
    sent = AdapterState({"w": torch.randn(n, generator=torch.Generator().manual_seed(0))})
    assert len(wire.pack_update(Update("c", {"delta": sent}, 1), Int4())) * 9 < 4 * n


@pytest.mark.parametrize("block", [0, 1, 7, -2])
def test_a_block_is_even(block: int) -> None:
    with pytest.raises(ConfigError, match="even"):
        Int4(block=block)


@pytest.mark.parametrize("levels", [0, 8])
def test_four_bits_have_seven_levels(levels: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 7"):
        Int4(levels=levels)


# --- foreign bytes -----------------------------------------------------------------------------------------------


def forged(codec: Codec, **parts: torch.Tensor) -> bytes:
    class Forger:
        label, error_feedback = codec.label, False

        def encode(self, state: AdapterState) -> Any:
            return {**codec.encode(state), **parts}

        def decode(self, coded: Any, like: AdapterState) -> AdapterState:
            raise NotImplementedError

    return wire.pack_update(Update("c", {"delta": some()}, 1.0), Forger())


def frame(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


BOMB = zstandard.compress(bytes(1 << 24))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))


@pytest.mark.parametrize(
    ("codec", "parts"),
    [
        (Int4(), {"codes": frame(BOMB)}),
        (Int4(), {"codes": frame(UNSIZED)}),
        (Int4(), {"scales": frame(b"no frame")}),
        (Int4(), {"codes": torch.ones(3)}),
        (Int4(), {"more": torch.ones(3)}),
        (Int4(zstd=False), {"codes": frame(b"12")}),
        (Int8(zstd=False), {"scales": frame(b"123")}),
        (Bf16(), {"values": torch.ones(9)}),
        (Bf16(), {"values": torch.ones(9, dtype=torch.bfloat16)}),
    ],
)
def test_parts_of_another_size_or_kind_are_refused(codec: Codec, parts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(forged(codec, **parts), codec, {"delta": some()})
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(Int4(), Int8()), (Int4(), Fp32()), (Fp32(), Int4()), (Int4(block=32), Int4())],
    ids=names,
)
def test_another_codec_than_agreed_is_refused(sent: Codec, expected: Codec) -> None:
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(
            wire.pack_update(Update("c", {"delta": some()}, 1.0), sent), expected, {"delta": some()}
        )
    assert refused.value.code == "codec"


def test_fewer_levels_are_read_without_being_told() -> None:
    data = wire.pack_update(Update("c", {"delta": some()}, 1.0), Int4(levels=3))
    assert wire.unpack_update(data, Int4(levels=7), {"delta": some()}).delta.is_finite()


def test_states_of_another_layout_are_refused() -> None:
    data = wire.pack_update(Update("c", {"delta": AdapterState({"other": torch.ones(8)})}, 1.0), Int4())
    with pytest.raises(RefusedUpdate) as refused:
        wire.unpack_update(data, Int4(), {"delta": AdapterState({"w": torch.ones(8)})})
    assert refused.value.code == "keys"


# --- error feedback ------------------------------------------------------------------------------------------------


def uploads(codec: Codec, deltas: list[AdapterState]) -> tuple[AdapterState, dict[str, AdapterState]]:
    """The sum of what arrived, and the residual at the end."""
    owed: dict[str, AdapterState] = {}
    total = deltas[0].zeros_like()
    for delta in deltas:
        update = Update("c", {"delta": delta}, 1.0)
        meant = add_residual(update, owed) if codec.error_feedback else update
        arrived = Update("c", {"delta": there_and_back(codec, meant.delta)}, 1.0)
        owed.update(residual(meant, arrived))
        total = total + arrived.delta
    return total, owed


def test_with_error_feedback_all_that_arrived_is_all_that_was_sent_but_for_one_rounding() -> None:
    deltas = [some(seed) for seed in range(30)]
    meant = sum(deltas[1:], start=deltas[0])
    arrived, owed = uploads(Int4(error_feedback=True), deltas)
    assert (arrived + owed["delta"] - meant).norm() < 1e-5 * meant.norm()
    assert (arrived - meant).norm() < 2 * (there_and_back(Int4(), deltas[0]) - deltas[0]).norm()


def test_without_it_a_small_step_in_one_direction_never_arrives() -> None:
    delta = AdapterState({"w": torch.tensor([1.0, 0.05])})  # below half a fifth
    assert uploads(Int4(), [delta] * 20)[0]["w"][1] == 0.0
    assert uploads(Int4(error_feedback=True), [delta] * 20)[0]["w"][1] == pytest.approx(
        1.0, abs=0.11
    )  # 20 * 0.05


def test_a_client_that_diverged_keeps_its_residual() -> None:
    before = {"delta": state(0.5)}
    lost = Update("c", {"delta": state(math.nan)}, 1.0)
    assert {**before, **residual(add_residual(lost, before), lost)} == before


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Fp32(), *LOSSY, Int4(error_feedback=True)], ids=names)
def test_bytes_reported_are_those_of_the_messages(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def weighed(update: Update, codec: Codec, **options: Any) -> bytes:
        data = pack(update, codec, **options)
        sizes.append(len(data))
        return data

    pack = wire.pack_update
    monkeypatch.setattr(wire, "pack_update", weighed)
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    broadcasts = {c: Broadcast(0, {"adapter": state(0.0, 0.0)}) for c in FOUR}
    arrived = list(Simulation(FedAvg(), ToyEngine(), clients, codec=codec).exchange(broadcasts))
    assert [a.bytes_up for a in arrived] == sizes


def test_the_server_averages_what_arrived_not_what_was_meant() -> None:
    codec = Int4(levels=1)  # with a single level every value becomes 0 or the largest of its block
    client = {"a": Client("a", (1.0,))}
    transport = Simulation(FedAvg(), ToyEngine(start=(0.0, 0.6)), client, codec=codec)
    [arrived] = transport.exchange({"a": Broadcast(0, {"adapter": state(0.0, 0.6)})})
    assert numbers(arrived.open().delta) == [0.5, 0.0]  # meant were 0.5 and 0.2


def test_a_residual_is_taken_over_where_the_update_was_used_and_nowhere_else() -> None:
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    transport = Simulation(FedAvg(), ToyEngine(), clients, codec=Int4(levels=1, error_feedback=True))
    list(transport.exchange({c: Broadcast(0, {"adapter": state(0.0, 0.6)}) for c in FOUR}))
    transport.settle(0, ["a", "c"])
    assert sorted(transport.snapshot().residuals) == ["a", "c"]


class _Stop(Listener):
    def committed(self, record: Mapping[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


def coded(folder: Path, codec: Any) -> Simulated:
    return training(folder, rounds=5, transport={"codec": codec})


FEEDBACK = [
    {"name": "fp32"},
    {"name": "bf16", "error_feedback": True},
    {"name": "int8", "error_feedback": True},
    {"name": "int4", "error_feedback": True, "levels": 1},
]


@pytest.mark.parametrize("codec", FEEDBACK, ids=lambda c: c["name"])
def test_resume_equals_uninterrupted(codec: dict[str, Any], tmp_path: Path) -> None:
    whole = coded(tmp_path / "whole", codec).finish(Listener())
    with pytest.raises(KeyboardInterrupt):
        coded(tmp_path / "cut", codec).finish(_Stop())
    resumed = coded(tmp_path / "cut", codec).finish(Listener())
    assert resumed.adapter.sha256() == whole.adapter.sha256()
    whole_lines, cut_lines = (
        [
            (r["adapter_sha256"], r["bytes_up"], r["bytes_down"])
            for r in journal.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole_lines == cut_lines


def test_residuals_are_committed_with_the_round(tmp_path: Path) -> None:
    run = coded(tmp_path, FEEDBACK[3])
    run.finish(Listener())
    found = checkpoint.newest(tmp_path / "state", fingerprint=run.training.fingerprint).checkpoint
    assert found is not None
    assert sorted(found.transport.residuals) == sorted(FOUR)
    assert {key for memory in found.transport.memories.values() for key in memory} == {"seen/local"}


def test_what_diverged_is_refused_by_the_gate_under_a_codec_too() -> None:
    seen: list[Round] = []
    clients = {c: Client(c, xs) for c, xs in FOUR.items()}
    engine = ToyEngine(poison={"b": math.nan})
    transport = Simulation(FedAvg(), engine, clients, codec=Int4(error_feedback=True))
    federation = Federation(FedAvg(), transport, everybody(clients), after_round=lambda _, r: seen.append(r))
    federation.run(FedAvg().init(state(0.0, 0.0)), 2)
    assert [r.refused for r in seen] == [{"b": "non-finite"}] * 2
    assert sorted(transport.snapshot().residuals) == ["a", "c", "d"]


@pytest.mark.parametrize(
    "codec", [{"name": "int8", "zstd": False}, {"name": "int4"}, {"name": "bf16"}], ids=str
)
def test_a_plan_predicts_the_bytes_of_the_codec(codec: dict[str, Any]) -> None:
    changes = ["model.base=random:llama", "data.examples=64", "data.hold_out=1", "rounds=3"]
    experiment = load("quickstart", changes).with_(transport={"codec": codec})
    made = experiment.transport.codec
    planned, adapter = plan(experiment), load_machine(experiment).engine.initial_adapter(0)
    link, sizes = Downlink(made), []
    for r in range(3):  # everybody in each round
        link.publish(adapter + r * noise(adapter))
        sizes.append(
            len(link.pack(Broadcast(r, {"adapter": adapter}), r - 1 if r else None, experiment=NAMED))
        )
    update = Update(
        "client-000", {"delta": noise(adapter)}, 20.0, {"loss": 1.234567, "steps": 3, "tokens": 1234}
    )
    assert planned.bytes_up == pytest.approx(len(wire.pack_update(update, made, experiment=NAMED)), rel=0.005)
    assert planned.bytes_down == pytest.approx(sum(sizes) / 3, rel=0.005)


def noise(like: AdapterState) -> AdapterState:
    chance = torch.Generator().manual_seed(5)
    return like.map(lambda t: torch.randn(t.shape, generator=chance))
