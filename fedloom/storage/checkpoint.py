"""Commit protocol of a run: after a crash at any instant the newest valid round is found again, to the bit.

A round is two files. `round-00007.safetensors` holds every tensor; `round-00007.json`, the manifest,
holds the rest and the sha256 of both itself and the tensors. The manifest is written last: it is the
commit point. The newest valid pair wins, two are kept, and a damaged one is reported and not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load, save

from fedloom.algorithms.base import ServerState
from fedloom.errors import RunError
from fedloom.state import AdapterState
from fedloom.storage import durable
from fedloom.transport.base import Snapshot

SCHEMA = 3  # rises also when the same settings give another result: no run mixes both
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    state: ServerState
    transport: Snapshot
    record: Mapping[str, Any]  # the journal's line of this round, so that no crash can separate the two


def commit(folder: Path, checkpoint: Checkpoint, *, fingerprint: str) -> None:
    """Make this round durable, then drop all but the newest two. `fingerprint` names the experiment."""
    tensors: dict[str, Any] = {}
    values: dict[str, dict[str, dict[str, Any]]] = {}
    _put(tensors, "adapter", checkpoint.state.adapter)
    for slot, state in checkpoint.state.slots.items():
        _put(tensors, f"slot/{slot}", state)
    parts = {
        "server": {"": checkpoint.transport.server},
        "memory": checkpoint.transport.memories,
        "residual": checkpoint.transport.residuals,
    }
    for part, owners in parts.items():
        for owner, kept in owners.items():
            for key, value in kept.items():
                if isinstance(value, AdapterState):
                    _put(tensors, f"{part}/{owner}/{key}", value)
                else:
                    values.setdefault(part, {}).setdefault(owner, {})[key] = value
    data = save(tensors)
    round = checkpoint.state.round
    body = {
        "schema": SCHEMA,
        "fingerprint": fingerprint,
        "round": round,
        "sha256": hashlib.sha256(data).hexdigest(),
        "transport": values,
        "record": checkpoint.record,
    }
    folder.mkdir(parents=True, exist_ok=True)
    durable.write(folder / f"round-{round:05d}.safetensors", data)
    durable.write(folder / f"round-{round:05d}.json", _sealed(body))
    for manifest in sorted(folder.glob("round-*.json"))[:-KEPT]:
        manifest.unlink(missing_ok=True)
    stems = {manifest.stem for manifest in folder.glob("round-*.json")}
    for tensors_file in folder.glob("round-*.safetensors"):
        if tensors_file.stem not in stems:
            tensors_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    checkpoint: Checkpoint | None  # None: nothing was committed yet
    damaged: tuple[str, ...]  # file and reason of every newer round that could not be used


def newest(folder: Path, *, fingerprint: str, before: int | None = None) -> Found:
    """The newest valid round, before round `before` if that is given. Raises RunError if all are damaged."""
    damaged: list[str] = []
    manifests = sorted(folder.glob("round-*.json"), reverse=True)
    if before is not None:
        manifests = [m for m in manifests if int(m.stem.removeprefix("round-")) < before]
    for manifest in manifests:
        try:
            return Found(_read(manifest, fingerprint), tuple(damaged))
        except _Damaged as why:
            damaged.append(f"{manifest.name}: {why}")
    if damaged:
        raise RunError(
            f"No usable round in {folder}: {'; '.join(damaged)}. "
            "The files were changed after they were written; start again with another --out."
        )
    return Found(None, ())


class _Damaged(Exception):
    pass


def _read(manifest: Path, fingerprint: str) -> Checkpoint:
    try:
        sealed = json.loads(manifest.read_bytes())
        body = sealed["body"]
        seal = sealed["sha256"]
    except (ValueError, KeyError, TypeError) as broken:
        raise _Damaged("the manifest is not valid JSON") from broken
    if hashlib.sha256(_canonical(body)).hexdigest() != seal:
        raise _Damaged("the manifest's checksum does not match")
    if body["schema"] != SCHEMA:
        raise RunError(
            f"{manifest} was written by another version of fedloom (expected schema {SCHEMA}, got {body['schema']}): "
            "go on with that version, or start a new one in another --out."
        )
    if body["fingerprint"] != fingerprint:
        raise RunError(
            f"{manifest.parent.parent} holds a different experiment. Resume that one "
            "(--resume with its own experiment.toml), or start a new run in another --out."
        )
    try:
        data = manifest.with_suffix(".safetensors").read_bytes()
    except FileNotFoundError as missing:
        raise _Damaged("its tensors are missing") from missing
    if hashlib.sha256(data).hexdigest() != body["sha256"]:
        raise _Damaged("the tensors' checksum does not match")
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in load(data).items():
        group, _, name = key.rpartition("|")
        groups.setdefault(group, {})[name] = tensor
    states = {group: AdapterState(named) for group, named in groups.items()}
    parts: dict[str, dict[str, dict[str, Any]]] = {"server": {}, "memory": {}, "residual": {}}
    for part, owners in body["transport"].items():
        parts[part] = {owner: dict(values) for owner, values in owners.items()}
    for group, state in states.items():
        part, _, rest = group.partition("/")
        if part in parts:
            owner, _, key = rest.rpartition("/")
            parts[part].setdefault(owner, {})[key] = state
    slots = {g.removeprefix("slot/"): s for g, s in states.items() if g.startswith("slot/")}
    snapshot = Snapshot(parts["server"].get("", {}), parts["memory"], parts["residual"])
    return Checkpoint(ServerState(states["adapter"], body["round"], slots), snapshot, body["record"])


def _put(tensors: dict[str, Any], group: str, state: AdapterState) -> None:
    for name, tensor in state.items():
        tensors[f"{group}|{name}"] = tensor.contiguous().cpu()


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=False).encode()


def _sealed(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return json.dumps({"body": body, "sha256": digest}, sort_keys=True, ensure_ascii=False, indent=1).encode()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second server off the same run folder; the kernel releases it even after SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock", timeout=0)
    try:
        with held:
            yield
    except Timeout as taken:
        raise RunError(
            f"{folder} is in use by another process. Wait for it, or choose another --out."
        ) from taken
