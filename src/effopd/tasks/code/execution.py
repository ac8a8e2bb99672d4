"""One case in a sandbox: pass descriptors, read the output, keep the limits, report the end."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd.tasks.code.guest.programs import NO_MEMORY
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.sandbox import STOP_SECONDS, Sandbox

#: Bytes kept of standard error, and of a call's or test's result.
_STDERR_BYTES, _RESULT_BYTES = 4096, 16 << 20
#: Seconds between looks at the memory of a running case; short cases are not looked at.
_MEMORY_INTERVAL = 0.05
#: Memory limit in MiB from which on cases start with the imported packages that others mentioned.
_WARM_MEMORY = 512
_PAGE = os.sysconf("SC_PAGE_SIZE")


#: How a case ends. "error": uncaught exception or signal; "output", "files": too much output, too
#: many files; "lost": the sandbox ended.
ENDS = ("done", "error", "timeout", "memory", "output", "files", "lost")


@dataclass(frozen=True)
class Outcome:
    """End of a case.

    Attributes:
        end: one of `ENDS`.
        stdout: standard output; undecodable bytes are surrogates.
        stderr: the first 4 KiB of standard error.
        result: JSON text that a call or the tests wrote.
    """

    end: str
    stdout: str = ""
    stderr: str = ""
    result: str = ""


def execute(
    sandbox: Sandbox,
    mode: str,
    jobs: Sequence[Mapping[str, Any]],
    limits: Limits,
    stdin: str = "",
    seconds: float = 0.0,
) -> Outcome:
    """Run a case and wait for the end of all its processes.

    Args:
        mode: "program" (one job, its standard output counts), "call" (one job) or "tests" (jobs of
            the program and of the tests).
        jobs: what each process reads: the program, its arguments, ….
        seconds: wall-clock limit; 0: that of `limits`.
    """
    streams = [_file(stdin.encode("utf-8", "surrogateescape"))]
    readers: dict[int, _Reader] = {}
    null = None
    if mode == "program":
        streams.append(_pipe(readers, "stdout", limits.output_mb << 20, stop=True))
    else:
        null = os.open(os.devnull, os.O_WRONLY)
        streams.append(null)
    streams.append(_pipe(readers, "stderr", _STDERR_BYTES))
    streams += [_file(json.dumps(job).encode()) for job in jobs]
    if mode != "program":
        streams.append(_pipe(readers, "result", _RESULT_BYTES, stop=True))
    try:
        try:
            if limits.memory_mb >= _WARM_MEMORY:
                sandbox.warm_up("".join(str(job.get("program", "")) + str(job.get("tests", "")) for job in jobs))
            deadline = time.monotonic() + (seconds or limits.seconds)
            sandbox.send({"mode": mode, "limits": limits.resources()}, streams)
        finally:
            for descriptor in streams:
                os.close(descriptor)
        why, report = _watch(sandbox, readers, deadline, limits.memory_mb << 20)
        for reader in readers.values() if report else ():
            reader.drain()
        if report is None or not sandbox.emptied(STOP_SECONDS):
            sandbox.close()
        texts = {reader.name: reader.text() for reader in readers.values()}
        over = any(reader.over and reader.stop for reader in readers.values())
        end = why or ("lost" if report is None else "output" if over else _end_of(report, limits))
        return Outcome(end, **texts)
    except OSError:
        sandbox.close()
        return Outcome("lost")
    finally:
        for reader in readers.values():
            os.close(reader.descriptor)


def _end_of(report: Mapping[str, Any], limits: Limits) -> str:
    """How the process of the program ended."""
    status = report["status"][0]
    if report["files"]:
        return "files"
    if status == NO_MEMORY:
        return "memory"
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and report["cpu"] >= limits.resources()["cpu"]):
        return "timeout"
    return "done" if status == 0 or len(report["status"]) > 1 else "error"


def _watch(sandbox: Sandbox, readers: Mapping[int, _Reader], deadline: float, memory: int) -> tuple[str, dict | None]:
    """Read until the sandbox reports: why the case was stopped ("": it was not), and the report."""
    poll = select.poll()
    for descriptor in (*readers, sandbox.control.fileno()):
        poll.register(descriptor, select.POLLIN)
    next_look = time.monotonic() + 2 * _MEMORY_INTERVAL
    while True:
        now = time.monotonic()
        if now >= deadline:
            return _stopped(sandbox, "timeout")
        if now >= next_look:
            if resident_bytes(sandbox.process.pid) > memory:
                return _stopped(sandbox, "memory")
            next_look = time.monotonic() + _MEMORY_INTERVAL
        for descriptor, _ in poll.poll(max(1.0, 1000 * (min(deadline, next_look) - now))):
            if descriptor == sandbox.control.fileno():
                return "", sandbox.outcome(STOP_SECONDS)
            reader = readers[descriptor]
            if not reader.read():
                poll.unregister(descriptor)
            elif reader.over and reader.stop:
                return _stopped(sandbox, "output")


def _stopped(sandbox: Sandbox, why: str) -> tuple[str, dict | None]:
    sandbox.stop()
    return why, sandbox.outcome(STOP_SECONDS)


class _Reader:
    """Reading end of a pipe; keeps the first `limit` bytes."""

    def __init__(self, name: str, descriptor: int, limit: int, stop: bool) -> None:
        self.name, self.descriptor, self.stop = name, descriptor, stop
        self._limit, self._size = limit, 0
        self._parts: list[bytes] = []
        os.set_blocking(descriptor, False)

    @property
    def over(self) -> bool:
        return self._size > self._limit

    def read(self) -> bool:
        """Read a part; whether more can come."""
        return self._part() != b""

    def drain(self) -> None:
        """Read the rest, after every writer of the sandbox has ended.

        The descriptor of a writer can live on in a process that the grader forked meanwhile.
        """
        while self._part() and not self.over:
            pass

    def _part(self) -> bytes | None:
        """The next bytes; b"": there are no more, `None`: none at present."""
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return None
        if self._size < self._limit:
            self._parts.append(data)
        self._size += len(data)
        return data

    def text(self) -> str:
        return b"".join(self._parts)[: self._limit].decode("utf-8", "surrogateescape")


def _pipe(readers: dict[int, _Reader], name: str, limit: int, stop: bool = False) -> int:
    """Writing end of a new pipe, whose reader is added to `readers`."""
    ours, theirs = os.pipe()
    readers[ours] = _Reader(name, ours, limit, stop)
    return theirs


def _file(content: bytes) -> int:
    """Descriptor of an anonymous file, at its start."""
    descriptor = os.memfd_create("case")
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def resident_bytes(process: int) -> int:
    """Resident memory of a process and its descendants, in bytes; 0 where `/proc` does not tell."""
    total, pending = 0, [process]
    while pending:
        folder = Path(f"/proc/{pending.pop()}")
        try:
            total += (int((folder / "statm").read_text().split()[1])) * _PAGE
            for task in (folder / "task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError, ValueError):
            continue
    return total
