"""Scripts in processes of their own, without the seconds that importing torch, transformers and TRL
takes each time.

A fork server imports them once; every process is a fork of it. Nothing that uses threads or
autograd has run in the server, so the forks are as good as fresh interpreters. `torchrun` starts
the same scripts as a user would.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

#: Seconds that the others have to end by themselves after one has failed.
GRACE = 5.0
PRELOADED = ["helpers.tiny_run", "peft", "trl", "torch.distributed.fsdp", "effopd.distill.rl"]


class Finished(NamedTuple):
    """Exit status (of the first process that failed, negative for a signal) and what all processes
    printed.
    """

    status: int
    output: str


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    gc.freeze()  # the server's modules live for ever: no collection has to look at them
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_script(script: str | Path, *arguments: object, processes: int = 0, timeout: float = 240) -> Finished:
    """Run a script once per process, as torchrun does; for 0 processes, alone and without a process
    group.

    The first process that fails ends the others, which may still say why they failed too.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(processes)}
    context, words = _server(), [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(max(processes, 1))]
        ranks = []
        for rank, log in enumerate(logs):
            environment = common | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {})
            ranks.append(context.Process(target=_child, args=(str(script), words, environment, str(log))))
            ranks[-1].start()
        status, late = _wait(ranks, time.monotonic() + timeout)
        output = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    if late:
        raise TimeoutError(f"{script} took longer than {timeout:g} s:\n{output[-3000:]}")
    return Finished(status, output + (f"\nended by {signal.Signals(-status).name}\n" if status < 0 else ""))


def _wait(ranks: list, deadline: float) -> tuple[int, bool]:
    """(exit status of the first process that failed, whether the time was up)."""
    status, end = 0, deadline
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
        if not status and (status := next((rank.exitcode for rank in ranks if rank.exitcode), 0)):
            end = min(deadline, time.monotonic() + (GRACE if status > 0 else 0))
    late = not status and any(rank.is_alive() for rank in ranks)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
    return status, late


def torchrun(*command: object, processes: int) -> Finished:
    """`torchrun --nproc_per_node PROCESSES COMMAND …`, as a user calls it."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, env=environment)
    return Finished(done.returncode, done.stdout + done.stderr)
