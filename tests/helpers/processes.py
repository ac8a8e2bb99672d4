"""Scripts and modules in processes of their own, without the seconds that importing torch,
transformers and TRL takes each time.

Every process is a fork of a server. Nothing that uses threads or autograd has run in the server, so
the forks are as good as fresh interpreters. pytest forks the server off itself before the first
test (`fork_server`), with the modules of all tests; otherwise it starts with the first process.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

#: Seconds that the others have to end by themselves after one has failed.
GRACE = 5.0
#: Held while processes are started or asked how they are: an exit status can be read once.
_LOCK = threading.Lock()
PRELOADED = [
    "helpers.tiny_run", "peft", "trl", "torch.distributed.fsdp", "effopd.distill.rl", "effopd.tasks.math_equality",
]  # fmt: skip
#: Pipe whose closing ends the forked server; empty without one.
_ALIVE: list[int] = []


class Finished(NamedTuple):
    """Exit status (of the first process that failed, negative for a signal) and what all processes
    printed.
    """

    status: int
    output: str


def fork_server() -> None:
    """Fork the server off this process: it has the modules that are imported by now."""

    def fork(_python: str, _arguments: list[str], descriptors: list[int]) -> int:
        alive, _ALIVE[:] = (pipe := os.pipe())[0], pipe[1:]
        if pid := os.fork():
            os.close(alive)
            return pid
        os.close(_ALIVE.pop())
        # forked inside `ensure_running`; without its lock, processes of the server can have one too
        forkserver._forkserver._lock = threading.Lock()  # type: ignore[attr-defined]
        logging.getLogger().handlers.clear()  # pytest's: without them, warnings go to stderr
        try:
            forkserver.main(descriptors[0], alive, PRELOADED)
        finally:
            os._exit(0)

    resource_tracker.ensure_running()
    with mock.patch("multiprocessing.util.spawnv_passfds", fork):
        forkserver.ensure_running()


def is_forked() -> bool:
    return bool(_ALIVE)


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(code: str, arguments: list[str], environment: dict[str, str], log: str, cwd: str, package: str) -> None:
    gc.freeze()  # the server's modules live for ever: no collection has to look at them
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [code, *arguments]
    if package:
        for name in [name for name in sys.modules if name.split(".")[0] == "effopd"]:
            del sys.modules[name]
        sys.path.insert(0, package)
    if code.endswith(".py"):
        sys.path.insert(0, str(Path(code).parent))
        runpy.run_path(code, run_name="__main__")
    else:
        runpy.run_module(code, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_script(
    code: str | Path,
    *arguments: object,
    processes: int = 0,
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
    cwd: str | Path = ".",
    package: str | Path = "",
) -> Finished:
    """Run a script or module once per process, as torchrun does; for 0 processes, alone and without
    a process group.

    The first process that fails ends the others, which may still say why they failed too.

    Args:
        code: path of a `.py` file, or name of a module.
        environment: further environment variables.
        package: folder of another copy of `effopd`, which the process imports in place of this one.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(processes)}
    common |= environment or {}
    context, words = _server(), [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(max(processes, 1))]
        ranks = []
        for rank, log in enumerate(logs):
            variables = common | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {})
            settings = (str(code), words, variables, str(log), str(cwd), str(package))
            with _LOCK:
                ranks.append(context.Process(target=_child, args=settings))
                ranks[-1].start()
        status, late = _wait(ranks, time.monotonic() + timeout)
        output = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    if late:
        raise TimeoutError(f"{code} took longer than {timeout:g} s:\n{output[-3000:]}")
    return Finished(status, output + (f"\nended by {signal.Signals(-status).name}\n" if status < 0 else ""))


def _wait(ranks: list, deadline: float) -> tuple[int, bool]:
    """(exit status of the first process that failed, whether the time was up)."""
    status, end = 0, deadline
    while _alive(ranks) and time.monotonic() < end:
        time.sleep(0.02)
        if not status and (status := _first_failure(ranks)):
            end = min(deadline, time.monotonic() + (GRACE if status > 0 else 0))
    late = not status and bool(_alive(ranks))
    with _LOCK:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
    return status or (0 if late else _first_failure(ranks)), late


def _alive(ranks: list) -> list:
    with _LOCK:
        return [rank for rank in ranks if rank.is_alive()]


def _first_failure(ranks: list) -> int:
    with _LOCK:
        return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


@contextmanager
def forking_python() -> Iterator[list[str]]:
    """Command that stands in for `python` before `-m MODULE …`: the fork server runs the module."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/python")
        listener.listen()
        server = threading.Thread(target=_serve, args=(listener,))
        server.start()
        try:
            yield [sys.executable, "-I", str(Path(__file__).with_name("forked.py")), f"{folder}/python"]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        threading.Thread(target=_answer, args=(connection,)).start()


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile() as lines:
        words, environment, cwd = json.loads(lines.readline())
        dash_m, module, *arguments = words[1:] if words[0] == "-u" else words
        assert dash_m == "-m", words
        done = run_script(module, *arguments, environment=environment, cwd=cwd)
        connection.sendall(json.dumps(done).encode())


@contextmanager
def forking_executable() -> Iterator[Path]:
    """`forking_python` as one file, for what takes the path of an interpreter."""
    with forking_python() as command, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "python"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)
        yield path


def torchrun(*command: object, processes: int) -> Finished:
    """`torchrun --nproc_per_node PROCESSES COMMAND …`, with forks for its interpreters."""
    with forking_executable() as python:
        words = ("--standalone", "--nproc_per_node", processes, *command)
        return run_script("torch.distributed.run", *words, environment={"PYTHON_EXEC": str(python)})


class ForkedGrader:
    """A grading process (`effopd.tasks.worker`) as a fork, with what `subprocess.Popen` has."""

    def __init__(self, connection: Connection, words: list[str]) -> None:
        with _LOCK:
            self._process = _server().Process(target=_grade, args=(connection, words), daemon=True)
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with _LOCK:
            return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _grade(connection: Connection, words: list[str]) -> None:
    from effopd.tasks.grading_process import serve

    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["-c", str(connection.fileno()), *words]
    serve()
