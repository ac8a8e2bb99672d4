"""The grading process: calls one function for every message it gets, each within limits of time and
memory.

Runs in a fresh interpreter (see `worker`).
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

#: Address space of the process in bytes: a huge power becomes a MemoryError there, not a machine
#: out of memory.
_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Grade:
    """What came of one call.

    Attributes:
        score: the function's value; `None` when there is none.
        problem: empty, `"timeout"`, or what went wrong.
    """

    score: float | None
    problem: str = ""


def serve() -> None:
    """Main loop of the grading process: `serve FD module:function timeout [module …]`; reads lists
    of calls, answers each.
    """
    connection = Connection(int(sys.argv[1]))
    module, _, name = sys.argv[2].partition(":")
    limit = 2 * float(sys.argv[3]) + 1.0
    try:
        for other in sys.argv[4:]:
            importlib.import_module(other)
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # reported to the owner, which raises it
        connection.send(f"{type(error).__name__}: {error}")
        return
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers print their complaints about model output
    _limit_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a hung process from the kernel if the owner is gone
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
            except Exception as error:  # becomes a counted zero at the owner
                grade = Grade(None, f"{type(error).__name__}: {str(error)[:200]}")
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            connection.send(grade)


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass  # not every system has this limit (macOS); the time limit still holds
