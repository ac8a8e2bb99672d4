"""One sandbox: a bubblewrap process whose first process forks a process per case.

Isolated: user, mount, PID, IPC, UTS, cgroup and network namespaces; a read-only system without
`/etc`, `/home`, `/proc` and `/sys`; an empty environment; no capabilities, no new privileges; a
seccomp filter. Left out: CPU and memory cgroups, which an unprivileged user cannot rely on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from effopd.errors import SandboxError, TaskError
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.seccomp import seccomp_filter

#: Seconds for a sandbox to start, and to end a stopped case.
STARTUP_SECONDS, STOP_SECONDS = 60.0, 5.0
_GUEST = Path(__file__).parent / "guest"
_INSIDE = "/guest/effopd/tasks/code/guest"
_PACKAGES = "/packages"
#: Unprivileged user of the sandbox if the grader is root: limits on processes do not bind root.
_NOBODY = 65534
#: Folder of the outer mount namespace with what this user could not reach.
_STAGE = "/mnt"
_DROP = """
import ctypes, os, sys
os.setgroups([]); os.setresgid(*[{user}] * 3); os.setresuid(*[{user}] * 3)
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
_SERVE = "import sys; sys.path[:0] = ['/guest']; sys.path.append('/packages'); " + (
    "from effopd.tasks.code.guest.server import main; main({fd})"
)
_ADVICE = (
    "Install bubblewrap ('apt-get install bubblewrap', or 'dnf install bubblewrap'), and permit unprivileged user "
    "namespaces (docs/code_tasks.md has the settings for containers and clusters), or name a remote runner with "
    '--task_args \'{"runner": "module:function"}\'. Programs are never run without isolation.'
)


class Sandbox:
    """A running sandbox. Not thread-safe; see `Pool`.

    Args:
        limits: size of the writable folder.
        packages: installed packages that programs can import besides the standard library.

    Raises:
        SandboxError: bubblewrap is missing or the system does not permit namespaces.
    """

    def __init__(self, limits: Limits, packages: Sequence[str] = ()) -> None:
        self._cold = set(packages)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        filter_fd = _filter_descriptor()
        kept = [theirs.fileno()] + ([] if filter_fd is None else [filter_fd])
        with theirs, tempfile.TemporaryFile() as errors:
            try:
                self.process = _start(
                    command(limits, packages, theirs.fileno(), filter_fd),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=kept,
                    start_new_session=True,
                    env={"PATH": os.defpath},
                    cwd="/",
                )
            finally:
                if filter_fd is not None:
                    os.close(filter_fd)
            self._finalizer = weakref.finalize(self, _end, self.process, self.control, os.getpid())
            theirs.close()
            self.control.settimeout(STARTUP_SECONDS)
            try:
                ready = self.control.recv(1 << 16)
            except OSError:
                ready = b""
            if not ready:
                self.close()
                errors.seek(0)
                said = errors.read(2000).decode(errors="replace").strip() or "no message"
                raise SandboxError(
                    f"the sandbox for programs did not start: expected a namespace, got {said!r}. {_ADVICE}"
                )

    @property
    def alive(self) -> bool:
        """Whether the sandbox can take another case."""
        return self._finalizer.alive and self.process.poll() is None

    def warm_up(self, sources: str) -> None:
        """Import the packages that a case mentions, once; cases are forked with them.

        Raises:
            OSError: the sandbox ended.
        """
        packages = sorted(name for name in self._cold if name in sources)
        if packages:
            self._cold -= set(packages)
            self.control.settimeout(STARTUP_SECONDS)
            self.control.send(json.dumps({"mode": "import", "packages": packages}).encode())
            self.control.recv(64)

    def send(self, request: dict, descriptors: Sequence[int]) -> None:
        """Start a case; its processes get the descriptors."""
        socket.send_fds(self.control, [json.dumps(request).encode()], list(descriptors))

    def outcome(self, seconds: float) -> dict | None:
        """What the first process reports after a case; `None`: it did not within `seconds`."""
        self.control.settimeout(seconds)
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            return None
        return json.loads(data) if data else None

    def emptied(self, seconds: float) -> bool:
        """Whether the writable folder was emptied within `seconds` after the report.

        Another case starts only then: its time does not pay for files of the one before.
        """
        self.control.settimeout(seconds)
        try:
            return bool(self.control.recv(64))
        except OSError:
            return False

    def stop(self) -> None:
        """End the processes of the case."""
        with contextlib.suppress(OSError):
            self.control.send(b"stop")

    def close(self) -> None:
        """End every process of the sandbox."""
        self._finalizer()


#: One thread per process that starts all sandboxes: the kernel ends them with the thread that did.
_starters: dict[int, ThreadPoolExecutor] = {}
_starters_lock = threading.Lock()


def _start(arguments: Sequence[str], **settings: Any) -> subprocess.Popen[bytes]:
    with _starters_lock:
        if os.getpid() not in _starters:
            _starters.clear()
            _starters[os.getpid()] = ThreadPoolExecutor(1, "sandboxes")
        starter = _starters[os.getpid()]
    return starter.submit(lambda: subprocess.Popen[bytes](arguments, **settings)).result()


def _end(process: subprocess.Popen[bytes], control: socket.socket, owner: int) -> None:
    control.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _filter_descriptor() -> int | None:
    """Descriptor of the seccomp filter, at its start."""
    program = seccomp_filter()
    if program is None:
        return None
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, program)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def find_bubblewrap() -> str:
    """Path of `bwrap`.

    Raises:
        SandboxError: this is not Linux, or bubblewrap is not installed.
    """
    if sys.platform != "linux":
        raise SandboxError(f"programs are graded on Linux only: expected 'linux', got '{sys.platform}'. {_ADVICE}")
    path = shutil.which("bwrap", path=os.environ.get("PATH", os.defpath) + ":/usr/bin:/usr/local/bin")
    if path is None:
        raise SandboxError(f"grading programs needs bubblewrap: expected the command 'bwrap', got none. {_ADVICE}")
    return path


def command(limits: Limits, packages: Sequence[str], control: int, filter_fd: int | None) -> list[str]:
    """Command line of a sandbox.

    Args:
        control: descriptor of the connection to the grader, inherited.
        filter_fd: descriptor of the seccomp filter; `None`: none.
    """
    bwrap = find_bubblewrap()
    prefix = str(Path(sys.base_prefix).resolve())
    python = f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    mounts = {prefix: prefix, str(_GUEST): _INSIDE, **package_mounts(packages)}
    outer: list[str] = []
    if os.geteuid() == 0:
        staged = {source: f"{_STAGE}/{number}" for number, source in enumerate(mounts)}
        binds = [part for source, stage in staged.items() for part in ("--ro-bind", source, stage)]
        inner_python = python.replace(prefix, staged[prefix], 1)
        outer = [bwrap, "--dev-bind", "/", "/", "--tmpfs", _STAGE, *binds, "--die-with-parent", "--"]
        outer += [inner_python, "-I", "-S", "-c", _DROP.format(user=_NOBODY)]
        mounts = {staged[source]: target for source, target in mounts.items()}
    binds = [part for source, target in mounts.items() for part in ("--ro-bind", source, target)]
    return [
        *outer, bwrap,
        "--unshare-all", "--unshare-user", *_no_more_namespaces(filter_fd is not None), "--uid", "1000",
        "--gid", "1000", "--hostname", "sandbox",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--as-pid-1",
        "--clearenv", *(part for pair in _ENVIRONMENT.items() for part in ("--setenv", *pair)),
        "--ro-bind", "/usr", "/usr", *_system_links(), "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        *binds,
        "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(limits.folder_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/",
        *(() if filter_fd is None else ("--seccomp", str(filter_fd))),
        "--", python, "-S", "-s", "-P", "-c", _SERVE.format(fd=control),
    ]  # fmt: skip


def _no_more_namespaces(filtered: bool) -> list[str]:
    """Flag that forbids user namespaces inside. Containers make the kernel's setting read-only;
    the system call filter forbids them as well.
    """
    read_only = bool(os.statvfs("/proc/sys").f_flag & os.ST_RDONLY) if Path("/proc/sys").is_dir() else True
    return [] if filtered and read_only else ["--disable-userns"]


_ENVIRONMENT = {
    "PATH": "/usr/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "TMPDIR": "/tmp",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


def _system_links() -> list[str]:
    """`/lib`, `/lib64` and `/bin` as on this system: links into `/usr`, or folders."""
    parts: list[str] = []
    for path in map(Path, ("/bin", "/lib", "/lib64")):
        if path.is_symlink():
            parts += ["--symlink", str(path.readlink()).lstrip("/"), str(path)]
        elif path.is_dir():
            parts += ["--ro-bind", str(path), str(path)]
    return parts


def package_mounts(packages: Sequence[str]) -> dict[str, str]:
    """Path → path in the sandbox of installed packages, with their shared libraries.

    Raises:
        TaskError: a package is not installed, or is no package of Python files.
    """
    mounts: dict[str, str] = {}
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        folders = [Path(location).resolve() for location in (spec.submodule_search_locations or ())] if spec else []
        file = Path(spec.origin).resolve() if spec and spec.has_location and spec.origin else None
        if not folders and file is None:
            raise TaskError(
                f"task_args: packages: expected the import name of an installed package, got {name!r}. Install it, or "
                "remove it from the list."
            )
        for folder in folders:
            mounts[str(folder)] = f"{_PACKAGES}/{name}"
            libraries = folder.parent / f"{name}.libs"
            if libraries.is_dir():
                mounts[str(libraries)] = f"{_PACKAGES}/{libraries.name}"
        if not folders and file is not None:
            mounts[str(file)] = f"{_PACKAGES}/{file.name}"
    return mounts
