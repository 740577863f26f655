"""The commit protocol: the newest valid round is found again, and nothing damaged is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.base import ServerState
from fedloom.algorithms.local_only import LocalOnly
from fedloom.errors import RunError
from fedloom.experiment.listener import Listener
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.transport.base import Snapshot
from tests.fakes import ToyEngine, state, training

THIS = "fingerprint of this experiment"


def commit(folder: Path, round: int, **changes: Any) -> Checkpoint:
    made = Checkpoint(
        changes.get("state", ServerState(state(float(round)), round)),
        changes.get("transport", Snapshot(memories={"a": {"seen/local": 3 * round}})),
        {"round": round, "loss": 0.5},
    )
    checkpoint.commit(folder, made, fingerprint=THIS)
    return made


def newest(folder: Path) -> checkpoint.Found:
    return checkpoint.newest(folder, fingerprint=THIS)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Listening(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)


# --- what is kept ----------------------------------------------------------------------------------------


def test_an_empty_folder_holds_no_round(tmp_path: Path) -> None:
    assert newest(tmp_path / "state") == checkpoint.Found(None, ())


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    slots = {"m": state(0.1), "v": state(0.2, dtype=torch.float64)}
    memories = {
        "a": {"seen/local": 7, "adapter": state(1.5, dtype=torch.bfloat16), "list": [1, "x", None]},
        "NIH/a b|ä": {"adapter": state(-0.0)},  # an owner's name may be anything
    }
    server = {"holds": {"a": 3}, "oldest version": state(0.25)}
    sent = Snapshot(server, memories, {"a": {"delta": state(0.125)}})
    commit(tmp_path, 4, state=ServerState(state(1.0, 2.0), 4, slots), transport=sent)
    back = newest(tmp_path).checkpoint
    assert back is not None
    assert (back.state.round, back.state.adapter.sha256()) == (4, state(1.0, 2.0).sha256())
    assert {k: s.sha256() for k, s in back.state.slots.items()} == {k: s.sha256() for k, s in slots.items()}
    assert back.transport.memories["a"]["adapter"].sha256() == memories["a"]["adapter"].sha256()  # type: ignore[attr-defined]
    assert {k: back.transport.memories["a"][k] for k in ("seen/local", "list")} == {
        "seen/local": 7,
        "list": [1, "x", None],
    }
    assert back.transport.memories["NIH/a b|ä"]["adapter"].sha256() == state(-0.0).sha256()
    assert back.transport.server["holds"] == {"a": 3}
    assert back.transport.server["oldest version"].sha256() == state(0.25).sha256()
    assert {c: r["delta"].sha256() for c, r in back.transport.residuals.items()} == {
        "a": state(0.125).sha256()
    }
    assert back.record == {"round": 4, "loss": 0.5}


def test_the_last_two_rounds_are_kept(tmp_path: Path) -> None:
    for r in range(5):
        commit(tmp_path, r)
    assert names(tmp_path) == [f"round-0000{r}.{kind}" for r in (3, 4) for kind in ("json", "safetensors")]


def test_tensors_without_a_manifest_are_no_round(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    (tmp_path / "round-00002.json").unlink()
    found = newest(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.state.round, found.damaged) == (1, ())


def test_leftovers_of_a_crash_are_no_rounds(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    for name in (".round-00002.json.partial", ".round-00002.safetensors.partial"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "round-00009.safetensors").write_bytes(b"tensors whose manifest was never written")
    found = newest(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.state.round, found.damaged) == (1, ())


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(RunError, match="holds a different experiment"):
        checkpoint.newest(tmp_path, fingerprint="of another")


def test_a_run_of_another_version_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)  # that of version 0.1.0
    commit(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(
        RunError, match=r"another version of fedloom \(expected schema 3, got 2\): go on with that version"
    ) as said:
        newest(tmp_path)
    assert "\n" not in str(said.value)


# --- damage ----------------------------------------------------------------------------------------------


def flip(path: Path, *, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, *, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


DAMAGES = {
    "tensors cut to nothing": lambda f: cut(f / "round-00003.safetensors", keep=0.0),
    "tensors cut in half": lambda f: cut(f / "round-00003.safetensors", keep=0.5),
    "tensors lack a byte": lambda f: cut(f / "round-00003.safetensors", keep=0.9999),
    "tensors are too long": lambda f: (f / "round-00003.safetensors").write_bytes(
        (f / "round-00003.safetensors").read_bytes() + b"\0"
    ),
    "a bit of the tensors' header": lambda f: flip(f / "round-00003.safetensors", at=0.0),
    "a bit of the tensors": lambda f: flip(f / "round-00003.safetensors", at=1.0),
    "tensors are gone": lambda f: (f / "round-00003.safetensors").unlink(),
    "tensors of the round before": lambda f: (f / "round-00003.safetensors").write_bytes(
        (f / "round-00002.safetensors").read_bytes()
    ),
    "manifest cut to nothing": lambda f: cut(f / "round-00003.json", keep=0.0),
    "manifest cut in half": lambda f: cut(f / "round-00003.json", keep=0.5),
    "manifest is another file": lambda f: (f / "round-00003.json").write_text("[]"),
    "manifest lacks its seal": lambda f: (f / "round-00003.json").write_text('{"body": {"round": 3}}'),
    "a number in the manifest": lambda f: (f / "round-00003.json").write_text(
        (f / "round-00003.json").read_text().replace('"seen/local": 9', '"seen/local": 8')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_round_is_named_and_the_one_before_it_found(tmp_path: Path, damage: Any) -> None:
    for r in (1, 2, 3):
        commit(tmp_path, r)
    damage(tmp_path)
    found = newest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.state.round == 2
    [named] = found.damaged
    assert named.startswith("round-00003.json: ")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    manifest = tmp_path / "round-00002.json"
    whole = manifest.read_bytes()
    unnoticed = []
    for i in range(len(whole)):
        manifest.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        found = newest(tmp_path).checkpoint
        if found is not None and found.state.round == 2:
            unnoticed.append(bytes([whole[i]]))
    assert set(unnoticed) <= {b"\n", b" "}  # white space between values means nothing


def test_when_all_rounds_are_damaged_nothing_is_used(tmp_path: Path) -> None:
    for r in (1, 2):
        commit(tmp_path, r)
        cut(tmp_path / f"round-0000{r}.safetensors", keep=0.5)
    with pytest.raises(
        RunError, match=r"No usable round in .*round-00002.json: the tensors' checksum.*round-00001.json"
    ):
        newest(tmp_path)


# --- a whole run -----------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Stop(BaseException):
    pass


class StopsAfter(Listening):
    def __init__(self, round: int):
        super().__init__()
        self._round = round

    def committed(self, record: Any) -> None:
        if record["round"] == self._round:
            raise Stop


@pytest.mark.parametrize("algorithm", [None, LocalOnly()], ids=["fedavg", "local_only"])
def test_a_run_resumed_after_every_round_equals_the_undisturbed_one(tmp_path: Path, algorithm: Any) -> None:
    whole = training(tmp_path / "whole", algorithm=algorithm, rounds=4)
    expected = whole.finish(Listener())
    for r in (1, 2, 3):
        with pytest.raises(Stop):
            training(tmp_path / "parts", algorithm=algorithm, rounds=4).finish(StopsAfter(r))
    parts = training(tmp_path / "parts", algorithm=algorithm, rounds=4)
    assert parts.finish(Listener()).adapter.sha256() == expected.adapter.sha256()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for client, memory in ((c, x.memory) for c, x in whole.clients.items()):
        assert memory["seen/local"] == parts.clients[client].memory["seen/local"]
        if algorithm:
            assert memory["adapter"].sha256() == parts.clients[client].memory["adapter"].sha256()


def test_a_run_stopped_within_a_round_equals_the_undisturbed_one(tmp_path: Path) -> None:
    class Stops(ToyEngine):
        def answer(self, requests: Any) -> Any:
            if len(self.sent) == 4:  # held-out loss and fit of the first two rounds, in turns
                raise Stop
            return super().answer(requests)

    expected = training(tmp_path / "whole").finish(Listener())
    with pytest.raises(Stop):
        training(tmp_path / "parts", engine=Stops()).finish(Listener())
    assert training(tmp_path / "parts").finish(Listener()).adapter.sha256() == expected.adapter.sha256()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_before_the_damage_and_says_so(tmp_path: Path, damage: Any) -> None:
    expected = training(tmp_path / "whole", rounds=5).finish(Listener())
    with pytest.raises(Stop):
        training(tmp_path / "parts", rounds=5).finish(StopsAfter(3))
    damage(tmp_path / "parts" / "state")
    listener = Listening()
    resumed = training(tmp_path / "parts", rounds=5).finish(listener)
    assert resumed.adapter.sha256() == expected.adapter.sha256()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    [warning] = listener.warnings
    assert "round-00003.json" in warning
    assert "from the round before it" in warning


def test_a_journal_that_lost_a_line_is_said_and_changes_no_result(tmp_path: Path) -> None:
    expected = training(tmp_path / "whole").finish(Listener())
    with pytest.raises(Stop):
        training(tmp_path / "parts").finish(StopsAfter(2))
    path = tmp_path / "parts" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round": 1,', b'"round" 1,'))
    listener = Listening()
    assert training(tmp_path / "parts").finish(listener).adapter.sha256() == expected.adapter.sha256()
    assert "lacks round 1;" in listener.warnings[0]
    assert [r["round"] for r in records(tmp_path / "parts")] == [0, 2, 3]


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    expected = training(tmp_path).finish(Listener())
    engine = ToyEngine()
    assert training(tmp_path, engine=engine).finish(Listener()).adapter.sha256() == expected.adapter.sha256()
    assert engine.sent == []


# --- the lock --------------------------------------------------------------------------------------------


HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="in use by another process"), checkpoint.lock(tmp_path):
            pass
        other.kill()  # SIGKILL: nothing of its own releases the lock
        other.wait()
        with checkpoint.lock(tmp_path):
            assert (tmp_path / ".lock").exists()
