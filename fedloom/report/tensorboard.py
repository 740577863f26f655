"""A run's curves for TensorBoard, made from its journal. Needs the extra "tensorboard"."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedloom.errors import RunError
from fedloom.storage import journal
from fedloom.storage.files import METRICS


def export(run: Path, folder: Path) -> None:
    """Write metrics.jsonl as event files: losses, traffic and speed by round, one curve per client."""
    if not find_spec("tensorboard"):
        raise RunError("TensorBoard files need the package tensorboard: pip install 'fedloom[tensorboard]'.")
    records = journal.read(run / METRICS)
    if not records:
        raise RunError(f"{run} has no rounds to show: expected {run / METRICS}.")
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for r in records:
            step, held = r["round"], r["held_out"] or {}
            scalars = {
                "loss/train": r["loss"],
                "loss/held-out": held.get("loss"),
                "bytes/up": r["bytes_up"],
                "bytes/down": r["bytes_down"],
                "clients/refused": len(r["refused"]),
                "seconds": r["seconds"],
            }
            scalars |= {f"client loss/{c}": found.get("loss") for c, found in r["clients"].items()}
            scalars |= {f"client held-out/{c}": loss for c, loss in (held.get("clients") or {}).items()}
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
