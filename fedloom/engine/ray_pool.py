"""Workers on a Ray cluster: one actor each, on any machine where Ray finds room; needs the extra "ray".

Every machine needs the same version of fedloom, and the base model under the same name. Letters travel as
bytes through Ray's own connections. Anyone who may join the cluster may run code on it, so its network must
be trusted.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from fedloom.engine.loading import Setup
from fedloom.engine.pool import Remote, WorkerLost
from fedloom.engine.worker import Worker, pack_setup
from fedloom.errors import ConfigError, RunError


class RayWorkers:
    """Starts workers for a `Pool`. `address` is a cluster's, or "auto" for the one on this machine.

    A worker requests `threads` CPUs, and a GPU if `setup.device` is "cuda". Raises ConfigError if Ray or the
    cluster is missing.
    """

    def __init__(self, setup: Setup, *, threads: int, address: str):
        if not find_spec("ray"):
            raise ConfigError("machine.ray needs the package ray: pip install 'fedloom[ray]'.")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported
        import ray

        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="fedloom")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f'There is no Ray cluster at machine.ray = "{address}"; start one with: ray start --head.'
            ) from error
        options = {"num_cpus": threads, "num_gpus": int(setup.device == "cuda")}
        self._actor = ray.remote(**options)(_Actor)
        self._setup, self._threads = pack_setup(setup), threads
        self._actors: list[Any] = []

    def count(self) -> int:
        """The number of workers that the cluster has room for."""
        there = self._ray.cluster_resources()
        return max(1, int(there.get("CPU", 1)) // self._threads)

    def start(self, number: int) -> Actor:
        self._actors.append(self._actor.remote(self._setup, self._threads))
        return Actor(self._ray, self._actors[-1])

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


class Actor(Remote):
    """The pool's side of a worker."""

    def __init__(self, ray: Any, handle: Any):
        self._ray, self._handle = ray, handle

    def ask(self, letter: bytes) -> bytes:
        try:
            reply: bytes = self._ray.get(self._handle.reply.remote(letter))
            return reply
        except self._ray.exceptions.RayActorError as error:
            raise WorkerLost from error
        except self._ray.exceptions.RayError as error:
            raise RunError(f"Ray could not answer a batch of requests: {type(error).__name__}.") from error


class _Actor:
    """The worker's side, in a process of Ray's."""

    def __init__(self, setup: bytes, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._worker = Worker(setup)

    def reply(self, letter: bytes) -> bytes:
        return self._worker.reply(letter)
