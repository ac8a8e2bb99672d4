"""Main loop of the grading process: call one function per request, with time and memory limits.

Runs in a new interpreter (see `worker`).
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

#: Limit in bytes of the address space beyond what the libraries map: a huge power raises
#: MemoryError instead of exhausting the machine. A CUDA build of torch alone can map more.
_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Grade:
    """Outcome of one call.

    Attributes:
        score: value of the function; `None`: the call failed.
        problem: empty, `"timeout"`, or the error.
    """

    score: float | None
    problem: str = ""


def serve() -> None:
    """Read lists of calls from the connection and send one `Grade` per call.

    Command-line arguments: FD module:function timeout [module …].
    """
    connection = Connection(int(sys.argv[1]))
    module, _, name = sys.argv[2].partition(":")
    limit = 2 * float(sys.argv[3]) + 1.0
    try:
        for other in sys.argv[4:]:
            importlib.import_module(other)
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the owner raises it
        connection.send(f"{type(error).__name__}: {error}")
        return
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers print warnings about model output
    _limit_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends a hung process if the owner is gone
    connection.send("")
    while True:
        try:
            calls = connection.recv()
        except (EOFError, ConnectionError):
            return
        for call in calls:
            signal.setitimer(signal.ITIMER_REAL, limit)
            try:
                grade = Grade(float(function(*call)))
            except Exception as error:  # the owner counts it and scores 0
                grade = Grade(None, f"{type(error).__name__}: {str(error)[:200]}")
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            connection.send(grade)


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = _mapped() + _MEMORY_BYTES
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass  # some systems lack this limit (macOS); the time limit still applies


def _mapped() -> int:
    """Address space of this process in bytes; 0 where /proc does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
