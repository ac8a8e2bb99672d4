"""Grading function in a separate process, with a hard time limit.

Grading a model's answer can hang: `\\boxed{9^{9^{9^{9}}}}` keeps sympy inside C code, where Python
signal handlers never run. math-verify's own timeout relies on such handlers, and only works on the
main thread. Here a process that exceeds the limit is killed, and a new one grades the next answer.

The process is started with `subprocess`, because `multiprocessing` re-imports the user's main
script. It starts at the first grading, serves one caller at a time and is never shared across a
fork. It ends at the owner's garbage collection or exit, or when the connection closes because the
owner was killed. Works on Linux and macOS.

Left out: parallel grading. One process grades hundreds of answers per second, far more than a model
generates.
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

#: Calls per message. Answers come call by call, so this only bounds the calls resent at a restart.
_CHUNK = 64
#: Code run by a new interpreter.
_SERVE = "from effopd.tasks.grading_process import serve; serve()"
#: Seconds for a new process to import its libraries; not part of the grading limit.
_STARTUP_SECONDS = 120.0


class GradingWorker:
    """Caller of `module:function` in a separate process; every call ends within `timeout` seconds.

    A call that times out or raises scores 0.0 and is counted in `timeouts` or `errors`. The first
    of each kind is logged as a warning. Picklable: a copy has the same function and limit, its own
    process, and counts from zero.

    Args:
        function: `"module:function"`, importable in a new interpreter with this one's `sys.path`.
        timeout: wall-clock limit of one call, in seconds.
        imports: modules that the function imports when called; imported in advance, outside the
            time limit.
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
        """Score of each call, in order; `labels` name the calls in warnings."""
        return [self._settle(grade, label) for grade, label in zip(self.grade_many(calls), labels, strict=True)]

    def grade_many(self, calls: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Outcome of `function(*call)` for each call, in order.

        Raises:
            TaskError: the process does not start.
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
                "an answer to example %s scored 0 because grading failed: %s (limit %g s). Later failures are counted "
                "in `%s` without a message. If there are many timeouts, raise verify_timeout.",
                label,
                grade.problem,
                self.timeout,
                counter,
            )
        return 0.0

    def _grade_chunk(self, chunk: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Grades of the first calls of `chunk`: at least one, not all if the process is lost."""
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
        except BaseException:  # including Ctrl-C: leftover replies must not be read as the next call's
            self.close()
            raise
        return grades

    def _start(self) -> Connection:
        """Connection to this interpreter's grading process, started if needed or after a fork."""
        if self._owner != os.getpid():
            self._process = self._connection = self._finalizer = None
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()
        self._owner = os.getpid()
        connection, theirs = Pipe()
        with theirs:
            process = _spawn(theirs, [self.function, repr(self.timeout), *self.imports])
        self._process, self._connection = process, connection
        self._finalizer = weakref.finalize(self, _stop, process, connection, os.getpid())
        self._await_ready(connection)
        return connection

    def _await_ready(self, connection: Connection) -> None:
        try:
            problem = connection.recv() if connection.poll(_STARTUP_SECONDS) else f"no reply in {_STARTUP_SECONDS:g} s"
        except (EOFError, ConnectionError):
            problem = "it died immediately; see its error on stderr"
        if problem:
            raise TaskError(
                f"the grading process for '{self.function}' did not start: {problem}. A new '{sys.executable}' must "
                "be able to import this function. Check that the packages it needs are installed there."
            )


class WorkerVerifier:
    """Base class of verifiers that grade in a `GradingWorker`. Picklable.

    Subclasses implement `verify_batch` and `answer_found`.

    Args:
        function: see `GradingWorker`.
        timeout: hard wall-clock limit of one grading, in seconds.
        imports: see `GradingWorker`.
    """

    def __init__(self, function: str, timeout: float, imports: Sequence[str] = ()) -> None:
        self.worker = GradingWorker(function, timeout, imports)

    @property
    def timeouts(self) -> int:
        """Number of gradings stopped at the time limit so far."""
        return self.worker.timeouts

    @property
    def errors(self) -> int:
        """Number of gradings that failed for another reason so far."""
        return self.worker.errors

    def __call__(self, completion: str, example: Example) -> float:
        return self.verify_batch([completion], [example])[0]

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, one per example."""
        raise NotImplementedError

    def answer_found(self, completion: str) -> bool:
        """Whether there is an answer in the verifier's format outside the reasoning."""
        raise NotImplementedError


def _spawn(connection: Connection, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A new interpreter that serves `words` (function, limit, imports) at the connection."""
    descriptor = connection.fileno()
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(descriptor), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[descriptor],
        start_new_session=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """This process's environment with its module search path and one thread per library."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _stop(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    """Kill and reap the process, unless this is a fork of its owner."""
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()
