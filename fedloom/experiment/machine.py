"""From settings to a machine to train on: base model, tokenizer, prompt format and engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedloom.data.template import Template
from fedloom.engine import loading
from fedloom.engine.loading import Facts, Setup
from fedloom.experiment.settings import Experiment
from fedloom.state import AdapterState
from fedloom.steps import Engine

if TYPE_CHECKING:  # settings and data are read without waiting for torch
    from fedloom.engine.layout import AdapterLayout
    from fedloom.engine.lora_engine import LoraEngine
    from fedloom.engine.pool import Workers

SMALL = 100_000_000  # parameters; a smaller base model is no faster with two threads than with one


def load_template(experiment: Experiment, model: Any, tokenizer: Any) -> Template:
    """The prompt format for this base model, whose weights are not needed."""
    from fedloom.engine.generation import positions

    p, most = experiment.prompt, positions(model) or sys.maxsize
    return Template(
        tokenizer,
        format=p.format,
        max_length=p.max_length,
        positions=most,
        loss_on=p.loss_on,
        system=p.system,
    )


@dataclass(frozen=True)
class Skeleton:
    """A base model without its weights: enough to check an experiment and count parameters."""

    model: Any  # on the meta device
    template: Template
    tokenizer: Any

    @property
    def positions(self) -> int:
        return self.template.positions

    @property
    def parameters(self) -> int:
        """Parameters in the base model, tied ones counted once."""
        from fedloom.engine.models import count_parameters

        return count_parameters(self.model)

    @property
    def vocabulary(self) -> int:
        """How many different tokens the base model embeds."""
        return int(self.model.get_input_embeddings().num_embeddings)


def load_skeleton(experiment: Experiment) -> Skeleton:
    from fedloom.engine import models

    m = experiment.model
    model, tokenizer = models.skeleton(m.base, allow_download=m.allow_download)
    return Skeleton(model, load_template(experiment, model, tokenizer), tokenizer)


@dataclass(frozen=True)
class Machine:
    """Everything that computes: an engine, in this process or in workers, and what belongs to its base model.

    `close` it at the end, or use it in a `with` statement; its workers end then.
    """

    engine: Engine
    template: Template
    tokenizer: Any
    layout: AdapterLayout
    facts: Facts
    threads: int = 1  # of the engine, or of each of its workers
    close: Callable[[], None] = lambda: None

    @property
    def positions(self) -> int:
        """The most tokens that the base model reads; a very large number where nothing limits it."""
        return self.template.positions

    @property
    def base_hash(self) -> str:
        """Hash of the weights in the precision they compute in, on which answers depend."""
        return self.facts.base_hash

    @property
    def base_sha256(self) -> str:
        """Hash of the weights as stored: it identifies the base whatever the dtype."""
        return self.facts.base_sha256

    def ranked(self, place: int) -> Machine:
        """The same machine seen from this place in the queue: workers serve lower places first.

        Of a machine that is ranked already, a place within its own.
        """
        from fedloom.engine.pool import Pool, Ranked

        if not isinstance(self.engine, Pool | Ranked):
            return self
        return replace(self, engine=self.engine.ranked(place))

    def initial_adapter(self, seed: int) -> AdapterState:
        """The start of every training with this seed; it leaves the base model's outputs unchanged."""
        return self.layout.initial(seed)

    def is_base(self, sha256: str) -> bool:
        """Is this the base with that recorded hash? Version 0.1.0 hashed the weights as computed with."""
        return sha256 in (self.base_sha256, self.base_hash)

    def describe(self) -> dict[str, Any]:
        """How it computes: for the record, and to explain the speed."""
        return {
            "path": self.facts.path,
            "reason": self.facts.reason,
            "decoding_reason": self.facts.decoding_reason,
            "base_sha256": self.base_sha256,
            "trained_parameters": self.layout.size,
            "format": self.template.format,
            "end": self.template.end_text,
            "end_reachable": self.facts.end_reachable,
            "conv1d": any(t.kind == "conv1d" for t in self.layout),
            "workers": self.engine.workers,
            "threads": self.threads,
        }

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_machine(experiment: Experiment, *, batches: int = 1) -> Machine:
    """Load the machine. At most `batches` batches are under way at once; more workers would stay idle.

    With one worker, everything is computed in this process.
    """
    if workers(experiment, batches=batches) == 1 and experiment.machine.ray is None:
        return load_here(experiment)[0]
    return load_workers(experiment, batches=batches)


def load_workers(experiment: Experiment, *, batches: int) -> Machine:
    """A machine in other processes, which end immediately when it is closed."""
    from fedloom.engine.fork_server import ForkServer
    from fedloom.engine.layout import AdapterLayout
    from fedloom.engine.pool import Pool
    from fedloom.engine.ray_pool import RayWorkers

    base, wanted = load_skeleton(experiment), experiment.machine
    count = workers(experiment, batches=batches)
    threads = threads_of(experiment, base.parameters, workers=count)
    setup = _setup(experiment, base.template)
    source: Workers
    if wanted.ray is None:
        source = ForkServer(setup, threads=threads)
    else:
        source = RayWorkers(setup, threads=threads, address=wanted.ray)
        count = min(batches, source.count() if wanted.workers == "auto" else wanted.workers)
    pool = Pool(source, count, encode=base.template.encode)
    try:
        facts = pool.facts()
    except BaseException:
        pool.close()
        raise
    layout = AdapterLayout.of(base.model, experiment.adapter)
    return Machine(pool, base.template, base.tokenizer, layout, facts, threads, pool.close)


def load_here(experiment: Experiment) -> tuple[Machine, LoraEngine]:
    """A machine in this process, and its engine for uses of the model itself: streams, merging, gradients."""
    import torch

    base = load_skeleton(experiment)
    threads = threads_of(experiment, base.parameters, workers=1)
    torch.set_num_threads(threads)
    engine, facts = loading.load(_setup(experiment, base.template), base.template.encode)
    return Machine(engine, base.template, base.tokenizer, engine.layout, facts, threads, engine.close), engine


def workers(experiment: Experiment, *, batches: int) -> int:
    """How many workers to use; "auto" means one per core or GPU, but no more than `batches` keep busy."""
    import torch

    from fedloom.engine import models

    wanted, device = experiment.machine.workers, models.kind_of(experiment.machine.device)
    there = {"cpu": cores(), "cuda": torch.cuda.device_count()}.get(device, 1)
    count = there if wanted == "auto" else wanted
    return max(1, min(batches, count if device == "cpu" else min(count, there)))  # no two workers share a GPU


def threads_of(experiment: Experiment, parameters: int, *, workers: int) -> int:
    """Threads per worker; "auto" divides the cores among them where products are large enough to gain."""
    if experiment.machine.threads != "auto":
        return experiment.machine.threads
    return 1 if parameters < SMALL else max(1, cores() // workers)


def cores() -> int:
    """OMP_NUM_THREADS where it is set, else the cores this process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _setup(experiment: Experiment, template: Template) -> Setup:
    from fedloom.engine import models

    m, its = experiment.model, experiment.machine
    return Setup(
        base=m.base,
        dtype=m.dtype,
        device=models.kind_of(its.device),
        quantize=None if m.quantize == "none" else m.quantize,
        allow_download=m.allow_download,
        lora=experiment.adapter,
        tokens_per_pass=its.tokens_per_pass,
        kernels=its.kernels,
        checkpointing=its.checkpointing,
        vllm=None if its.vllm is None else its.vllm.model_dump(mode="json", exclude_none=True),
        end=template.end,
    )


def load_base(experiment: Experiment) -> tuple[Any, Any]:
    from fedloom.engine import models

    m = experiment.model
    return models.load_base(
        m.base,
        dtype=m.dtype,
        device=experiment.machine.device,
        quantize=None if m.quantize == "none" else m.quantize,
        allow_download=m.allow_download,
    )
