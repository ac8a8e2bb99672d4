"""First process of the sandbox: forks one process per case and ends all others after it.

It holds neither programs nor expected outputs: they reach the forked processes through descriptors
that it only passes on. It cannot be traced, and ends when the grader closes the connection.
"""

from __future__ import annotations

import array
import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effopd.tasks.code.guest import programs

#: Modules that programs often import; imported once, before the forks.
_COMMON = ("cmath", "decimal", "fractions")
#: Folder that programs can write to.
_WRITABLE = "/tmp"
#: Limit → resource; the values are soft limits, and hard ones too except for the CPU time.
_RESOURCES = {
    "address_space": resource.RLIMIT_AS,
    "file_size": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
}
#: Most entries of the writable folder, and milliseconds between looks at them.
_MOST_FILES, _FILES_INTERVAL = 4096, 50
_PR_SET_DUMPABLE = 4
#: Descriptors: those of forked processes are moved from `_MOVED`, and `_ALL` is above all of them.
_MOVED, _CONTROL, _ALL = 100, 200, 1024


def main(control_fd: int) -> None:
    """Serve requests; in a forked process, run its part and leave the interpreter normally."""
    for name in _COMMON:
        __import__(name)
    programs.imported_names()
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # the module `site`, which has them, is not loaded
    _hide()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process ignores signals without a handler
    control = socket.socket(fileno=fcntl.fcntl(control_fd, fcntl.F_DUPFD_CLOEXEC, _CONTROL))
    os.close(control_fd)
    gc.disable()
    gc.collect()
    gc.freeze()
    control.send(b'{"ready": true}')
    run = _serve(control)
    if run is None:
        os._exit(0)
    _leave(_guarded(run))


def _serve(control: socket.socket) -> Callable[[], int] | None:
    """Handle requests; the function to run in a forked process, or `None` at the end."""
    limits_at_start = _limits()
    while True:
        message, descriptors = _receive(control)
        if not message:
            return None
        if message == b"stop":  # of a case that had just ended by itself
            continue
        request = json.loads(message)
        if request["mode"] == "import":
            _import(request["packages"])
            control.send(b"imported")
            continue
        run = _start(request, descriptors, control)
        if callable(run):
            return run
        for descriptor in descriptors:
            os.close(descriptor)
        outcome = _wait(run, control)
        if outcome is not None:
            control.send(json.dumps(outcome).encode())
        if outcome is None or _limits() != limits_at_start or not _clean():
            return None  # the end of the first process ends all others; the grader starts a new sandbox
        control.send(b"emptied")


def _import(packages: list[str]) -> None:
    """Import packages, so that forked processes need not; a broken one fails where it is used."""
    for name in packages:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    message, ancillary, _, _ = control.recvmsg(1 << 16, socket.CMSG_SPACE(8 * array.array("i").itemsize))
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return message, list(descriptors)


def _start(request: dict[str, Any], fds: list[int], control: socket.socket) -> list[int] | Callable[[], int]:
    """Fork the processes of a request: their ids, last the one that ends the case."""
    mode, limits = request["mode"], request["limits"]
    if mode == "program":
        parts = [(fds, lambda given: programs.run_program(_job(given[3])))]
    elif mode == "call":
        parts = [(fds, lambda given: programs.run_call(_job(given[3]), given[4]))]
    else:
        ours, theirs = (end.detach() for end in socket.socketpair())
        streams, (program, tests, result) = fds[:3], fds[3:]
        parts = [
            ([*streams, program, ours], lambda given: programs.run_candidate(_job(given[3]), given[4])),
            (
                [*streams, tests, theirs, result],
                lambda given: programs.run_tests(_job(given[3]), given[4], given[5]),
            ),
        ]
    children = []
    for descriptors, run in parts:
        pid = os.fork()
        if pid == 0:
            control.detach()
            return _in_child(descriptors, run, limits)
        children.append(pid)
    if mode == "tests":
        os.close(ours)
        os.close(theirs)
    return children


def _in_child(descriptors: list[int], run: Callable[[list[int]], int], limits: dict[str, int]) -> Callable[[], int]:
    """Give a forked process its descriptors, numbered from 0, its limits and a session."""
    high = [os.dup2(fd, _MOVED + index) for index, fd in enumerate(descriptors)]
    given = [os.dup2(fd, index) for index, fd in enumerate(high)]
    os.closerange(len(given), _ALL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))
    for name, kind in _RESOURCES.items():
        resource.setrlimit(kind, (limits[name], limits[name]))
    programs.new_streams()
    gc.enable()
    return lambda: run(given)


def _guarded(run: Callable[[], int]) -> int:
    """Exit status of a forked process, or `NO_MEMORY` after `MemoryError`.

    Another uncaught exception is printed without our frames.
    """
    try:
        return run()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        print(leaving.code, file=sys.stderr)
        return programs.FAILED
    except MemoryError:
        return programs.NO_MEMORY
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename not in ("<program>", "<prompt>", "<tests>"):
            frames = frames.tb_next
        print("".join(traceback.format_exception(type(error), error, frames, limit=-8)), file=sys.stderr, end="")
        return programs.FAILED


def _leave(status: int) -> None:
    """End a forked process as an interpreter ends, without freeing the modules: 7 ms less.

    Args:
        status: exit status, or minus the signal by which the process ends.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        vars(sys.modules.get("solution", sys.modules["__main__"])).clear()
        sys.stdout.flush()
    except SystemExit:
        pass
    except BaseException:
        status = status or programs.FAILED
    if status < 0:
        with contextlib.suppress(BaseException):  # the program can have ignored or blocked the signal
            signal.signal(-status, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
            signal.raise_signal(-status)
        status = programs.FAILED
    os._exit(status)


def _job(descriptor: int) -> dict[str, Any]:
    with open(descriptor, "rb") as file:
        return json.loads(file.read())


def _wait(children: list[int], control: socket.socket) -> dict[str, Any] | None:
    """Wait for the last child, or a message to stop; end every process. `None`: no grader."""
    ended = os.pidfd_open(children[-1])
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLIN)
    stopped = files = False
    while not (ready := [fd for fd, _ in poll.poll(_FILES_INTERVAL)]):
        if files := _entries() > _MOST_FILES:
            break
    os.close(ended)
    if ready and ended not in ready:
        stopped = True
        if not control.recv(64):
            return None
    statuses: dict[int, tuple[int, float]] = {}
    if not stopped and not files:
        _reap(children[-1], statuses)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    try:
        while True:
            _reap(-1, statuses)
    except ChildProcessError:
        pass
    codes = [statuses.get(child, (0, 0.0)) for child in children]
    return {
        "files": files,
        "status": [os.waitstatus_to_exitcode(code) for code, _ in codes],
        "cpu": max(cpu for _, cpu in codes),
    }


def _reap(which: int, statuses: dict[int, tuple[int, float]]) -> None:
    pid, code, usage = os.wait4(which, 0)
    statuses[pid] = (code, usage.ru_utime + usage.ru_stime)


def _entries() -> int:
    """Files, folders and links in the writable folder: its size does not limit their number."""
    status = os.statvfs(_WRITABLE)
    return status.f_files - status.f_ffree


def _clean() -> bool:
    """Empty the writable folder; whether it is empty."""
    try:
        Path(_WRITABLE).chmod(0o700)
        for entry in Path(_WRITABLE).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, onerror=_permit)
            else:
                entry.unlink()
        os.utime(_WRITABLE, (0, 0))
        return not any(Path(_WRITABLE).iterdir())
    except (OSError, RecursionError, ValueError):
        return False


def _permit(function: Callable[..., Any], path: str, _: Any) -> None:
    """Make a folder of the program writable and try again."""
    Path(path).parent.chmod(0o700)
    Path(path).chmod(0o700)
    function(path)


def _limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]


def _hide() -> None:
    """Keep other processes from tracing this one or reading its memory."""
    import ctypes

    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
