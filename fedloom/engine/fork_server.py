"""Worker processes on this machine: forks of one process that imports and loads everything once.

The fork server is a fresh process, so a fork cannot inherit a thread, lock or device in the middle of use. On
a CPU it loads the base model, so its weights, like the code, are in memory once for all workers. On GPUs each
worker loads its own, on the GPU with its number. All processes end with the one that started the server,
however that ends: its end of every connection closes with it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from fedloom.engine.loading import Setup
from fedloom.engine.pool import Remote, WorkerLost
from fedloom.engine.worker import Worker, pack_setup, read_setup
from fedloom.errors import RunError

GRACE = 1.0  # seconds that workers have to end what they started, before they are killed
SPAWNING = {
    "OMP_NUM_THREADS": "1",  # until a worker sets its own; OpenMP threads do not survive a fork
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin slow shared cores down
    "TOKENIZERS_PARALLELISM": "false",
}


class ForkServer:
    """Starts workers for a `Pool`. `threads` is the number that each worker computes with.

    `setup.device` is "cpu", or a kind of device with one for each worker.
    """

    def __init__(self, setup: Setup, *, threads: int):
        here, there = socket.socketpair()
        environment = os.environ | SPAWNING | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if setup.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # forks of a process that knows a GPU cannot train
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(there.fileno()), str(threads)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is meant for the process that started this one
            )
        self._control = Connection(here.detach())
        with suppress(OSError):  # it has ended already; `start` reports it
            self._control.send_bytes(pack_setup(setup))

    def start(self, number: int) -> Process:
        here, there = socket.socketpair()
        with there:
            try:
                self._control.send_bytes(str(number).encode())
                send_handle(self._control, there.fileno(), self._process.pid)
            except OSError as error:
                here.close()
                raise RunError(
                    "The process that starts the workers has ended; go on with --resume, or with machine.workers=1."
                ) from error
        return Process(Connection(here.detach()))

    def close(self) -> None:
        self._control.close()  # then the server ends its workers and itself
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it was still loading and has no workers
            self._process.wait()


class Process(Remote):
    """The pool's side of a worker."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def ask(self, letter: bytes) -> bytes:
        try:
            self._connection.send_bytes(letter)
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerLost from error
        except BaseException:  # interrupted: a late answer must not be taken for the next question's
            self._connection.close()
            raise


def serve(control: Connection, threads: int) -> None:
    """Run the server: fork for every incoming connection until no more can come."""
    setup = control.recv_bytes()
    shared = Worker(setup) if read_setup(setup).device == "cpu" else None
    gc.collect()
    gc.freeze()  # garbage collection in the forks would write to shared memory and so copy it
    workers: set[int] = set()
    try:
        while True:
            number = int(control.recv_bytes())
            handle = recv_handle(control)
            workers = _alive(workers)
            if pid := os.fork():
                os.close(handle)
                workers.add(pid)
            else:
                control.close()
                _work(Connection(handle), shared, setup, number, threads)
    except (EOFError, OSError):
        for end in (signal.SIGTERM, signal.SIGKILL):  # whoever does not end by itself is killed
            for (
                pid
            ) in workers:  # none has been waited for since it ended, so its process id has not been reused
                os.kill(pid, end)
            deadline = time.monotonic() + GRACE
            while workers and time.monotonic() < deadline:
                workers = _alive(workers)
                time.sleep(0.01)


def _alive(workers: set[int]) -> set[int]:
    return {pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0] == 0}


def _leave(*_: object) -> None:
    raise SystemExit


def _work(connection: Connection, shared: Worker | None, setup: bytes, number: int, threads: int) -> None:
    """Run a worker: reply to every letter until no more can come."""
    import torch

    code, worker = 1, shared
    signal.signal(signal.SIGTERM, _leave)
    try:
        torch.set_num_threads(threads)
        if worker is None:
            torch.cuda.set_device(number)
            worker = Worker(setup)
        with suppress(EOFError, OSError):
            while True:
                connection.send_bytes(worker.reply(connection.recv_bytes()))
        code = 0
    finally:
        if worker is not None:
            worker.close()
        os._exit(code)  # without the cleanup of the server that this was forked from


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
