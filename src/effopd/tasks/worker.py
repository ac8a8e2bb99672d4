"""A grading function in its own process, with a time limit that holds.

Answers come from a model, so grading them can hang: `\\boxed{9^{9^{9^{9}}}}` keeps sympy inside C
code, where Python signal handlers (what math-verify's own timeout uses, and only on the main
thread) never run. Here the grading function lives in a separate Python process; past the limit that
process is killed and a fresh one takes the next answer.

The process is started with `subprocess` and not `multiprocessing`, because the latter re-imports
the user's main script. It is lazy (nothing starts until the first grading), serves one caller at a
time, is never shared across a fork, and ends with its owner: at garbage collection, at interpreter
exit, and, should the owner be killed, when its connection closes. Works on Linux and macOS.

Left out: parallel grading. One process does hundreds of gradings a second, a model produces far
fewer.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example
from effopd.tasks.grading_process import Grade

logger = logging.getLogger(__name__)

#: Calls sent in one message; a worker answers call by call, so this only bounds what a restart has
#: to send again.
_CHUNK = 64
#: What a fresh interpreter runs.
_SERVE = "from effopd.tasks.grading_process import serve; serve()"
#: Seconds a fresh process may take to import its libraries; not part of any grading's limit.
_STARTUP_SECONDS = 120.0


class GradingWorker:
    """Calls `module:function` in a process of its own; every call ends within `timeout` seconds.

    A call that times out or raises scores 0.0, is counted (`timeouts`, `errors`) and the first of
    each is logged as a warning. Picklable: a copy has the same function and limit, its own process,
    and counts from zero.

    Args:
        function: `"module:function"`, importable in a fresh interpreter with this one's `sys.path`.
        timeout: wall-clock limit of one call, in seconds.
        imports: modules that the function imports when it is called; they are imported before the
            first limit runs.
    """

    def __init__(self, function: str, timeout: float, imports: Sequence[str] = ()) -> None:
        self.function = function
        self.timeout = timeout
        self.imports = tuple(imports)
        self.timeouts = 0
        self.errors = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._owner = 0
        self._finalizer: weakref.finalize | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GradingWorker, (self.function, self.timeout, self.imports)

    def score_many(self, calls: Sequence[tuple[Any, ...]], labels: Sequence[str]) -> list[float]:
        """Score of each call in order; `labels` name the calls in warnings."""
        return [self._settle(grade, label) for grade, label in zip(self.grade_many(calls), labels, strict=True)]

    def grade_many(self, calls: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Outcome of `function(*call)` for each call, in order.

        Raises:
            TaskError: the process does not start (the message has the reason).
        """
        grades: list[Grade] = []
        with self._lock:
            while len(grades) < len(calls):
                grades += self._grade_chunk(calls[len(grades) : len(grades) + _CHUNK])
        return grades

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._connection = self._finalizer = None

    def _settle(self, grade: Grade, label: str) -> float:
        if not grade.problem:
            assert grade.score is not None
            return grade.score
        if grade.problem == "timeout":
            self.timeouts += 1
            first, counter = self.timeouts == 1, "timeouts"
        else:
            self.errors += 1
            first, counter = self.errors == 1, "errors"
        if first:
            logger.warning(
                "grading an answer to example %s scored 0: %s (limit %g s). Further ones are counted in `%s` without "
                "a message; raise verify_timeout if they are many.",
                label,
                grade.problem,
                self.timeout,
                counter,
            )
        return 0.0

    def _grade_chunk(self, chunk: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Grades of the first calls of `chunk`; ends early, after at least one, when the process is
        lost.
        """
        grades: list[Grade] = []
        try:
            connection = self._start()
            connection.send(list(chunk))
            while len(grades) < len(chunk):
                if not connection.poll(self.timeout):
                    self.close()
                    return [*grades, Grade(None, "timeout")]
                grades.append(connection.recv())
        except (EOFError, ConnectionError):
            code = self._process.wait() if self._process is not None else None
            self.close()
            return [*grades, Grade(None, f"the grading process died (exit status {code})")]
        except BaseException:  # Ctrl-C included: half an exchange must not be read as the next one's answer
            self.close()
            raise
        return grades

    def _start(self) -> Connection:
        """The connection to a running process of this very interpreter (a forked child starts its
        own).
        """
        if self._owner != os.getpid():
            self._process = self._connection = self._finalizer = None
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()
        self._owner = os.getpid()
        connection, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno()), self.function, repr(self.timeout), *self.imports],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_environment(),
            )
        self._process, self._connection = process, connection
        self._finalizer = weakref.finalize(self, _stop, process, connection, os.getpid())
        self._await_ready(connection)
        return connection

    def _await_ready(self, connection: Connection) -> None:
        try:
            problem = connection.recv() if connection.poll(_STARTUP_SECONDS) else f"no sign in {_STARTUP_SECONDS:g} s"
        except (EOFError, ConnectionError):
            problem = "it died at once; its last words are on stderr"
        if problem:
            raise TaskError(
                f"the grading process for '{self.function}' did not start: {problem}. Expected a fresh "
                f"'{sys.executable}' to import it; check that the package it needs is installed there."
            )


class WorkerVerifier:
    """A verifier that grades in a `GradingWorker`; subclasses say how, in `verify_batch`.
    Picklable.

    Args:
        function: see `GradingWorker`.
        timeout: hard limit of one grading, in seconds of wall-clock time.
        imports: see `GradingWorker`.
    """

    def __init__(self, function: str, timeout: float, imports: Sequence[str] = ()) -> None:
        self.worker = GradingWorker(function, timeout, imports)

    @property
    def timeouts(self) -> int:
        """Gradings cut at the limit so far."""
        return self.worker.timeouts

    @property
    def errors(self) -> int:
        """Gradings that failed otherwise so far."""
        return self.worker.errors

    def __call__(self, completion: str, example: Example) -> float:
        return self.verify_batch([completion], [example])[0]

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, each with its example."""
        raise NotImplementedError

    def answer_found(self, completion: str) -> bool:
        """Whether there is an answer in the form that the verifier looks for, outside of the
        reasoning.
        """
        raise NotImplementedError


def _environment() -> dict[str, str]:
    """This process's environment with its module search path, and one thread for numerical
    libraries.
    """
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _stop(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    """Kill and reap the process, unless this is a fork of its owner."""
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()
