"""Worker processes on this machine: forks of one process that imports and loads everything once.

The fork server is started afresh, so it has no threads, locks or devices in use that a fork could inherit halfway.
On a CPU it loads the base model, whose weights, like the code, are then in memory once for all workers. On GPUs each
worker loads its own, on the GPU of its number. All of them end when the process that started the server does,
however it ends: its end of every connection closes with it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from fedloom.engine.loading import Setup
from fedloom.engine.pool import Remote, WorkerLost
from fedloom.engine.worker import Worker, pack_setup, read_setup
from fedloom.errors import RunError

SPAWNING = {
    "OMP_NUM_THREADS": "1",  # until a worker sets its own; threads of OpenMP do not survive a fork
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin slow everything down on shared cores
    "TOKENIZERS_PARALLELISM": "false",
}


class ForkServer:
    """Starts workers for a `Pool`. `threads` are those that each worker computes with.

    `setup.device` is "cpu", or a kind of device of which there is one for each worker.
    """

    def __init__(self, setup: Setup, *, threads: int):
        here, there = socket.socketpair()
        environment = os.environ | SPAWNING | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if setup.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a fork of a process that knows a GPU cannot train
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(there.fileno()), str(threads)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
        self._control = Connection(here.detach())
        with suppress(OSError):  # it has ended already; `start` tells
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
        self._control.close()  # at which the server ends its workers and itself
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it was still loading, and has no workers
            self._process.wait()


class Process(Remote):
    """A worker as its pool sees it."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def ask(self, letter: bytes) -> bytes:
        try:
            self._connection.send_bytes(letter)
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerLost from error
        except BaseException:  # interrupted: whatever it still answers must not meet the next question
            self._connection.close()
            raise


def serve(control: Connection, threads: int) -> None:
    """The server's life: a fork for every connection that comes, until none can come any more."""
    setup = control.recv_bytes()
    shared = Worker(setup) if read_setup(setup).device == "cpu" else None
    gc.collect()
    gc.freeze()  # collections in the forks would write to shared memory, and so copy it
    workers: set[int] = set()
    try:
        while True:
            number = int(control.recv_bytes())
            handle = recv_handle(control)
            workers = {pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0] == 0}
            if pid := os.fork():
                os.close(handle)
                workers.add(pid)
            else:
                control.close()
                _work(Connection(handle), shared, setup, number, threads)
    except (EOFError, OSError):
        for pid in workers:  # none of them has been waited for since it ended, so the number is still its own
            os.kill(pid, signal.SIGKILL)


def _work(connection: Connection, shared: Worker | None, setup: bytes, number: int, threads: int) -> None:
    """A worker's life: a reply for every letter, until none can come any more."""
    import torch

    code = 1
    try:
        torch.set_num_threads(threads)
        if shared is None:
            torch.cuda.set_device(number)
        worker = shared or Worker(setup)
        with suppress(EOFError, OSError):
            while True:
                connection.send_bytes(worker.reply(connection.recv_bytes()))
        code = 0
    finally:
        os._exit(code)  # not the way of the server, whose child this is


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
