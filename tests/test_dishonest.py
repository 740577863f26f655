"""One of five clients is dishonest, in every way we could think of: bytes go in, and the honest result comes out.

Each forgery is refused under its code in every round, the run goes on, and it ends in the bits of a run in which the
client never took part.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load
from safetensors.torch import save as safetensors

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client import Client
from fedloom.errors import RefusedUpdate
from fedloom.experiment import commands, summary
from fedloom.federation import Federation, Round
from fedloom.gate import Gate
from fedloom.messages import Broadcast, ClientId, Update
from fedloom.report import card, page
from fedloom.state import AdapterState
from fedloom.transport import wire
from fedloom.transport.base import Arrival
from fedloom.transport.codec import Codec, Fp32, Int4, Int8
from fedloom.transport.in_process import InProcess, Simulation
from tests.fakes import (
    FOUR,
    A,
    B,
    NoFiles,
    ToyEngine,
    dataset,
    everybody,
    experiment,
    machine,
    skeleton,
    state,
)

FIVE = {**FOUR, "m": (2.0, 3.0)}  # m is dishonest
ROUNDS = 3
OURS = "0123456789abcdef"  # the experiment's name in every message
NAME_A, NAME_B = f"delta/{A}", f"delta/{B}"

Said = list[tuple[ClientId, bytes]]
Forge = Callable[[bytes, "Known"], bytes | Said]


class Known:
    """What a dishonest client knows beside its own honest answer: the letter it got, all it ever sent, b's answer."""

    def __init__(self) -> None:
        self.letter = b""
        self.past: list[bytes] = []
        self.of_b = b""


class Dishonest:
    """A channel at whose other end m sends what `forge` makes of its honest answer."""

    def __init__(self, inner: InProcess, forge: Forge):
        self.inner, self.forge, self.known = inner, forge, Known()

    def call(self, method: str, payloads: Mapping[ClientId, bytes]) -> Iterator[tuple[ClientId, bytes]]:
        for client, data in self.inner.call(method, payloads):
            self.known.of_b = data if client == "b" else self.known.of_b
            if client != "m":
                yield client, data
                continue
            self.known.letter = payloads["m"]
            said = self.forge(data, self.known)
            self.known.past.append(data)
            yield from [("m", said)] if isinstance(said, bytes) else said


# --- forging -----------------------------------------------------------------------------------------------------


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    said, _ = parts(data)
    return json.loads(json.loads(said)["__metadata__"]["fedloom"]), load(data[wire.CHECKSUM :])


def save(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    return wire.seal(safetensors(dict(tensors), metadata))  # a liar's checksum is right


def fields(**changes: Any) -> Forge:
    """The honest answer with other fields; `...` takes one out."""

    def forge(data: bytes, known: Known) -> bytes:
        found, tensors = opened(data)
        kept = {k: v for k, v in {**found, **changes}.items() if v is not ...}
        return save(tensors, {"fedloom": json.dumps(kept)})

    return forge


def tensors(**changes: Any) -> Forge:
    """The honest answer with other tensors: a function of the honest one, or None to leave it out."""

    def forge(data: bytes, known: Known) -> bytes:
        found, sent = opened(data)
        for name, change in changes.items():
            key = {"a": NAME_A, "b": NAME_B}.get(name, f"delta/{name}")
            if change is None:
                del sent[key]
            else:
                sent[key] = change(sent.get(key)).contiguous()
        return save(sent, {"fedloom": json.dumps(found)})

    return forge


def filled(value: float) -> Forge:
    return tensors(a=lambda t: torch.full_like(t, value), b=lambda t: torch.full_like(t, value))


def rounds_off(by: int) -> Forge:
    return lambda data, known: fields(round=opened(data)[0]["round"] + by)(data, known)


def states(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]], *named: str) -> Forge:
    def forge(data: bytes, known: Known) -> bytes:
        found, sent = opened(data)
        return save(change(sent), {"fedloom": json.dumps({**found, "states": list(named)})})

    return forge


def bytes_of(make: Callable[[bytes], bytes]) -> Forge:
    """What is behind the checksum, made into something else."""
    return lambda data, known: wire.seal(make(data[wire.CHECKSUM :]))


def damaged(make: Callable[[bytes], bytes]) -> Forge:
    """On its way: the checksum is that of the honest answer."""
    return lambda data, known: make(data)


def parts(data: bytes) -> tuple[str, bytes]:
    body = data[wire.CHECKSUM :]
    length = int.from_bytes(body[:8], "little")
    return body[8 : 8 + length].decode(), body[8 + length :]


def whole(header: str | bytes, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + rest


def header(change: Callable[[str], str]) -> Forge:
    def forge(data: bytes, known: Known) -> bytes:
        said, rest = parts(data)
        made = change(said)
        assert made != said
        return wire.seal(whole(made, rest))

    return forge


def table(change: Callable[[dict[str, Any]], None]) -> Forge:
    """The honest answer with other shapes or offsets in the table of its tensors."""

    def changed(said: str) -> str:
        found = json.loads(said)
        change(found)
        return json.dumps(found)

    return header(changed)


def twice(said: str) -> str:
    """Both times the same offsets, so that no byte is left over."""
    [entry] = [f'"{NAME_A}":{json.dumps(json.loads(said)[NAME_A], separators=(",", ":"))}']
    assert entry in said
    return said.replace(entry, f"{entry},{entry}")


@cache
def million() -> bytes:
    entry = '"delta/%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return whole("{" + ",".join(entry % i for i in range(10**6)) + "}", b"")


class Burglar:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was executed",))


def archive(data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("adapter.safetensors", bytes(1 << 24))
    return made.getvalue()


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Forge:
    """Under a codec: the honest answer with another part of the coded delta."""

    def forge(data: bytes, known: Known) -> bytes:
        found, sent = opened(data)
        sent[f"delta/{name}"] = change(sent.get(f"delta/{name}", torch.zeros(0, dtype=torch.uint8)))
        return save(sent, {"fedloom": json.dumps(found)})

    return forge


def frame(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def coded(state: AdapterState, codec: Codec) -> Forge:
    def forge(data: bytes, known: Known) -> bytes:
        update = Update("m", {"delta": state}, 1, round=opened(data)[0]["round"])
        return wire.pack_update(update, codec, experiment=opened(data)[0]["experiment"])

    return forge


FORGERIES: dict[str, tuple[str, Forge]] = {
    # values
    "one NaN": ("non-finite", tensors(a=lambda t: t.index_fill(1, torch.tensor([0]), math.nan))),
    "all NaN": ("non-finite", filled(math.nan)),
    "infinity": ("non-finite", tensors(b=lambda t: t.index_fill(0, torch.tensor([1]), math.inf))),
    "minus infinity": ("non-finite", filled(-math.inf)),
    "a flood of subnormal numbers": ("subnormal", filled(1e-40)),
    "1e30": ("norm", filled(1e30)),
    "the largest float": ("norm", filled(3.4e38)),
    "beyond the absolute bound": ("norm", filled(600.0)),  # 4 values: a norm of 1,200
    "out of proportion to the cohort": ("norm", filled(300.0)),
    # shapes and precisions
    "a scalar that would broadcast": ("shape", tensors(a=lambda t: t.sum())),
    "a column that would broadcast": ("shape", tensors(a=lambda t: t[:, :1])),
    "a stack of three": ("shape", tensors(a=lambda t: t.expand(3, 1, 2))),
    "transposed": ("shape", tensors(a=lambda t: t.T)),
    "flattened": ("shape", tensors(b=lambda t: t.flatten())),
    "no rows": ("shape", tensors(a=lambda t: t[:0])),
    "a shape without values of 10^15": ("malformed", table(lambda t: t[NAME_A].update(shape=[0, 10**15], data_offsets=[0, 0]))),
    "five thousand dimensions": ("shape", table(lambda t: t[NAME_A].update(shape=[1] * 5000 + [1, 2]))),
    "float64": ("dtype", tensors(a=lambda t: t.double())),
    "float16": ("dtype", tensors(a=lambda t: t.half())),
    "whole numbers": ("dtype", tensors(a=lambda t: t.long())),
    "truth values": ("dtype", tensors(a=lambda t: t > 0)),
    "an unknown precision": ("malformed", table(lambda t: t[NAME_A].update(dtype="F33"))),
    # names
    "a missing tensor": ("keys", tensors(b=None)),
    "an extra tensor": ("keys", tensors(extra=lambda t: torch.ones(1))),
    "another name": ("keys", header(lambda said: said.replace("lora_A", "lora_X"))),
    "a name that looks alike": ("keys", header(lambda said: said.replace("lora_A", "lora_\u0410"))),
    "a name with a path in it": ("keys", header(lambda said: said.replace("delta/", "delta/../delta/"))),
    "a tensor without a name": ("keys", header(lambda said: said.replace(f'"{NAME_A}"', '"delta"'))),
    "two tables of fields": ("malformed", header(lambda s: s[:-1] + ',"__metadata__":{"fedloom":"{}"}}')),
    "fields that are a number": ("malformed", lambda data, known: save({}, {"fedloom": "5"})),
    "a tensor twice": ("malformed", header(twice)),
    "a field twice": ("malformed", header(lambda s: s.replace('\\"weight\\":', '\\"weight\\": 1, \\"weight\\":'))),
    "no states": ("states", states(lambda t: {})),
    "an empty delta": ("keys", states(lambda t: {}, "delta")),
    "an extra state": ("states", states(lambda t: {**t, "more/w": torch.ones(1)}, "delta", "more")),
    "another state": ("states", header(lambda s: s.replace("delta/", "elta/").replace('\\"delta\\"', '\\"elta\\"'))),
    "a state named twice": ("malformed", fields(states=["delta", "delta"])),
    "a tensor of no state": ("malformed", states(lambda t: {**t, "more/w": torch.ones(1)}, "delta")),
    # weights
    "a negative weight": ("weight", fields(weight=-1)),
    "a weight of NaN": ("weight", fields(weight=math.nan)),
    "a weight of infinity": ("weight", fields(weight=math.inf)),
    "a weight of 1e9": ("weight", fields(weight=1e9)),
    "a weight of 401 digits": ("weight", fields(weight=10**400)),
    "no weight": ("malformed", fields(weight=...)),
    "a weight of null": ("malformed", fields(weight=None)),
    "a weight of true": ("malformed", fields(weight=True)),
    "a weight of 5,000 digits": ("malformed", header(lambda s: s.replace('\\"weight\\": ', '\\"weight\\": ' + "1" * 5000))),
    "a weight in letters": ("malformed", fields(weight="7")),
    # rounds and experiments
    "a stale round": ("round", rounds_off(-1)),
    "a future round": ("round", rounds_off(1)),
    "a replay of an earlier answer": ("round", lambda data, known: (known.past or [rounds_off(-1)(data, known)])[0]),  # type: ignore[return-value]
    "no round": ("malformed", fields(round=...)),
    "half a round": ("malformed", fields(round=0.5)),
    "a round of 401 digits": ("round", fields(round=10**400)),
    "another base model": ("experiment", fields(experiment="fedcba9876543210")),
    "no experiment": ("experiment", fields(experiment=...)),
    # who speaks
    "speaks for b": ("sender", fields(client="b")),
    "b's own answer": ("sender", lambda data, known: known.of_b),
    "speaks for nobody": ("sender", fields(client="")),
    "a client that looks alike": ("sender", fields(client="m\u200d")),
    "a client that is no UTF-8": ("sender", fields(client="\ud800")),
    "a client that is no text": ("malformed", fields(client=["m"])),
    # sizes
    "oversize": ("size", tensors(extra=lambda t: torch.zeros(1 << 20))),
    "a million tensors": ("size", bytes_of(lambda d: million())),
    "a header of 400 GB": ("malformed", bytes_of(lambda d: struct.pack("<Q", 400 * 10**9) + d[8:])),
    "a header of 2^64 bytes": ("malformed", bytes_of(lambda d: b"\xff" * 8 + d[8:])),
    "a tensor of 400 GB": ("malformed", table(lambda t: t[NAME_A].update(shape=[10**11], data_offsets=[0, 4 * 10**11]))),
    "a shape that overflows": ("malformed", table(lambda t: t[NAME_A].update(shape=[2**32, 2**32]))),
    "a negative shape": ("malformed", table(lambda t: t[NAME_A].update(shape=[-1, -2]))),
    # bytes
    "no bytes": ("malformed", damaged(lambda d: b"")),
    "a bit that flipped": ("malformed", damaged(lambda d: d[:-1] + bytes([d[-1] ^ 1]))),
    "cut off on its way": ("malformed", damaged(lambda d: d[:-1])),
    "nothing but a checksum": ("malformed", bytes_of(lambda d: b"")),
    "truncated in the header": ("malformed", bytes_of(lambda d: d[:40])),
    "truncated by a byte": ("malformed", bytes_of(lambda d: d[:-1])),
    "a byte too many": ("malformed", bytes_of(lambda d: d + b"\0")),
    "garbage": ("malformed", bytes_of(lambda d: b"\x17garbage" * 50)),
    "zeros": ("malformed", bytes_of(lambda d: bytes(len(d)))),
    "a pickle": ("malformed", bytes_of(lambda d: pickle.dumps(Burglar()))),
    "a zip archive": ("malformed", bytes_of(archive)),
    "a header that is no UTF-8": ("malformed", bytes_of(lambda d: whole(b'{"\xff": 1}', b""))),
    "a header that is a list": ("malformed", bytes_of(lambda d: whole("[1, 2]", b""))),
    "deep JSON": ("malformed", bytes_of(lambda d: whole("[" * 30_000 + "]" * 30_000, b""))),
    "deep JSON in the fields": ("malformed", lambda d, k: save({}, {"fedloom": "[" * 30_000})),
    "overlapping tensors": ("malformed", table(lambda t: t[NAME_B].update(data_offsets=t[NAME_A]["data_offsets"]))),
    "a gap between tensors": ("malformed", table(lambda t: t[NAME_B].update(data_offsets=[9, 17]))),
    "no metadata": ("malformed", table(lambda t: t.pop("__metadata__"))),
    "the letter sent back": ("schema", lambda data, known: known.letter),
    "another schema": ("schema", fields(schema=1)),
    "another codec": ("codec", coded(state(1.0, 1.0), Int8())),
    # metrics
    "a metric of NaN": ("non-finite", fields(metrics={"loss": math.nan})),
    "a metric of infinity": ("non-finite", fields(metrics={"tokens": math.inf})),
    "a metric of 1e300": ("metrics", fields(metrics={"tokens": 1e300})),
    "a metric of 401 digits": ("metrics", fields(metrics={"steps": 10**400})),
    "a metric nobody reports": ("metrics", fields(metrics={"diagnosis": 1.0})),
    "a metric whose name has 10 MB": ("size", fields(metrics={"x" * 10_000_000: 1.0})),
    "a thousand metrics": ("metrics", fields(metrics={f"m{i}": 0.0 for i in range(1000)})),
    "a metric in letters": ("malformed", fields(metrics={"loss": "low"})),
    "a metric of true": ("malformed", fields(metrics={"loss": True})),
    "metrics in a list": ("malformed", fields(metrics=[1.0])),
}  # fmt: skip
CODED: dict[str, tuple[str, Forge]] = {
    "a zip bomb": ("malformed", part("codes", lambda t: frame(zstandard.compress(bytes(1 << 26))))),
    "a frame of unsaid size": ("malformed", part("codes", lambda t: frame(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4))))),
    "half a frame": ("malformed", part("codes", lambda t: t[: len(t) // 2])),
    "no frame": ("malformed", part("scales", lambda t: frame(b"no frame"))),
    "scales of another kind": ("malformed", part("scales", lambda t: t.float())),
    "one part more": ("malformed", part("more", lambda t: t)),
    "scales that are no numbers": ("non-finite", part("scales", lambda t: frame(zstandard.compress(b"\x00\xff" * 2)))),
    "scales that are huge": ("norm", part("scales", lambda t: frame(zstandard.compress(b"\x00\xf0" * 2)))),
    "other shapes than they say": ("keys", coded(state(1.0, 1.0, 1.0), Int4())),
    "no layout": ("keys", fields(layouts=...)),
    "a layout that is a list": ("keys", fields(layouts=[1])),
    "nothing coded": ("states", states(lambda t: {})),
    "tensors as they are": ("codec", coded(state(1.0, 1.0), Fp32())),
    "other blocks": ("codec", coded(state(1.0, 1.0), Int4(block=32))),
}  # fmt: skip


def of(names: Mapping[str, tuple[str, Forge]]) -> Any:
    return pytest.mark.parametrize(("code", "forge"), names.values(), ids=list(names))


# --- the loop ------------------------------------------------------------------------------------------------------


def federate(cohort: str, forge: Forge | None, codec: Codec = Fp32()) -> tuple[str, list[Round], Simulation]:
    clients = {c: Client(c, FIVE[c]) for c in cohort}
    transport = Simulation(FedAvg(), ToyEngine(), clients, clients_per_batch=2, codec=codec, experiment=OURS)
    if forge is not None:
        transport.server.channel = Dishonest(transport.server.channel, forge)  # type: ignore[arg-type]
    seen: list[Round] = []
    federation = Federation(FedAvg(), transport, everybody(sorted(cohort)), lambda _, r: seen.append(r))
    end = federation.run(ServerState(state(0.0, 0.0)), ROUNDS)
    return end.adapter.sha256(), seen, transport


HONEST = {codec: federate("abcd", None, codec)[0] for codec in (Fp32(), Int4())}


@of(FORGERIES)
def test_a_dishonest_answer_is_refused_and_the_honest_result_stands(code: str, forge: Forge) -> None:
    end, seen, _ = federate("abcdm", forge)
    assert [r.refused for r in seen] == [{"m": code}] * ROUNDS
    assert end == HONEST[Fp32()]


@of(CODED)
def test_so_it_is_under_a_codec(code: str, forge: Forge) -> None:
    end, seen, _ = federate("abcdm", forge, Int4())
    assert [r.refused for r in seen] == [{"m": code}] * ROUNDS
    assert end == HONEST[Int4()]


def test_a_client_that_is_honest_is_used() -> None:
    """Else the tests above would pass with a gate that refuses m, whatever it says."""
    end, seen, _ = federate("abcdm", lambda data, known: data)
    assert [r.refused for r in seen] == [{}] * ROUNDS
    assert end != HONEST[Fp32()]


def test_a_refused_client_remembers_nothing() -> None:
    _, _, transport = federate("abcdm", filled(math.nan))
    assert sorted(transport.snapshot().memories) == ["a", "b", "c", "d"]


def test_whoever_nobody_asked_is_refused_and_changes_nothing() -> None:
    end, seen, _ = federate("abcdm", lambda data, known: [("stranger", data), ("", data)])
    assert [r.refused for r in seen] == [{"(not asked)": "unknown"}] * ROUNDS
    assert end == HONEST[Fp32()]


def test_an_answer_that_comes_twice_counts_once() -> None:
    honest, _, _ = federate("abcdm", lambda data, known: data)
    end, seen, _ = federate("abcdm", lambda data, known: [("m", data), ("m", filled(5.0)(data, known))])
    assert [r.refused for r in seen] == [{"m": "duplicate"}] * ROUNDS
    assert end == honest


def test_a_second_try_after_a_refusal_is_not_taken() -> None:
    end, seen, _ = federate("abcdm", lambda data, known: [("m", b"garbage"), ("m", data)])
    assert [r.refused for r in seen] == [{"m": "malformed"}] * ROUNDS
    assert end == HONEST[Fp32()]


def test_a_weight_of_zero_is_legal_and_does_not_count() -> None:
    """An honest client of FedPIT that made no synthetic example has it."""
    end, seen, _ = federate("abcdm", fields(weight=0))
    assert [r.refused for r in seen] == [{}] * ROUNDS
    assert end == HONEST[Fp32()]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load_data", lambda *_, **__: dataset(FIVE))
    monkeypatch.setattr(commands, "load_machine", lambda *_, **__: machine(ToyEngine()))
    monkeypatch.setattr(commands, "load_skeleton", lambda _: skeleton())
    monkeypatch.setattr(commands, "_export_files", lambda *_: NoFiles())
    monkeypatch.setattr(page, "write", lambda folder: (folder / "report.html").write_text("a page"))
    monkeypatch.setattr(card, "model_card", lambda summary, **_: "a card")
    monkeypatch.setattr(summary, "environment", dict)


@of(FORGERIES | {"a stranger with a name that is no text": ("", lambda data, known: [("\ud800", data)])})
def test_a_whole_run_ends_beside_a_dishonest_client(
    toy: None, code: str, forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = InProcess.call

    class Inner:
        def __init__(self, channel: InProcess):
            self.channel = channel

        def call(self, method: str, payloads: Mapping[ClientId, bytes]) -> Any:
            return call(self.channel, method, payloads)

    known: list[Dishonest] = []

    def dishonest(self: InProcess, method: str, payloads: Mapping[ClientId, bytes]) -> Any:
        known[:] = known or [Dishonest(Inner(self), forge)]  # type: ignore[arg-type]
        return known[0].call(method, payloads)

    monkeypatch.setattr(InProcess, "call", dishonest)
    commands.run(experiment(adapter={"rank": 1}, rounds=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines[1:]] == [
        {"m": code} if code else {"(not asked)": "unknown"}
    ] * 2
    assert [sorted(line["clients"]) for line in lines[1:]] == [["a", "b", "c", "d"]] * 2
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize("name", ["client", "schema", "experiment", "codec", "kind", "metrics", "states"])
def test_no_refusal_repeats_what_was_sent(name: str) -> None:
    """Foreign text does not get into logs by way of a refusal."""
    value = {"metrics": {"diagnosis": 1.0}, "states": ["delta", "diagnosis"]}.get(name, "diagnosis")
    data = fields(**{name: value})(wire.pack_update(Update("m", {"delta": state(1.0, 1.0)}, 1)), Known())
    arrived = Arrival("m", len(data), 0, lambda: wire.unpack_update(data))
    message = Broadcast(0, {"adapter": state(0.0, 0.0)})
    with pytest.raises(RefusedUpdate) as refused:
        Gate().admit(arrived, {"m": message}, FedAvg().expects(message), FedAvg.reports, ())
    assert "diagnosis" not in str(refused.value)
