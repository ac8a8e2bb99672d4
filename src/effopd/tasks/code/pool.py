"""A warm pool of sandboxes: several answers at a time, restart after a crash."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from effopd.tasks.code.execution import Outcome, execute
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.sandbox import Sandbox

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def default_workers() -> int:
    """CPUs of this process, divided between the training processes of the machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdecimal() else 1))


class Pool:
    """Sandboxes that are started when first needed and kept for later answers. Thread-safe.

    Args:
        limits: size of the writable folder of a sandbox.
        workers: number of sandboxes.
        packages: installed packages that programs can import.
    """

    def __init__(self, limits: Limits, workers: int, packages: Sequence[str] = ()) -> None:
        self.limits, self.workers, self.packages = limits, workers, tuple(packages)
        self.restarts = 0
        self._owner = 0
        self._idle: queue.SimpleQueue[Sandbox | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._opened()

    def _opened(self) -> None:
        """An empty place per sandbox; anew in a forked process, which must not use its parent's."""
        with self._lock:
            if self._owner != os.getpid():
                self._owner = os.getpid()
                self._idle = queue.SimpleQueue()
                for _ in range(self.workers):
                    self._idle.put(None)

    def map(
        self,
        function: Callable[[Callable[..., Outcome], _Item], _Result],
        items: Iterable[_Item],
        progress: Callable[[int], object] | None = None,
    ) -> list[_Result]:
        """`function(run, item)` for each item, in order, `workers` at a time.

        Raises:
            SandboxError: a sandbox does not start.
        """
        self._opened()

        def one(item: _Item) -> _Result:
            sandbox = self._idle.get()
            holder = [sandbox]
            try:
                return function(lambda *args: self._run(holder, *args), item)
            finally:
                self._idle.put(holder[0])
                if progress is not None:
                    progress(1)

        items = list(items)
        with ThreadPoolExecutor(max(1, min(self.workers, len(items))), "grade") as threads:
            try:
                return list(threads.map(one, items))
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, holder: list[Sandbox | None], *args: Any) -> Outcome:
        """One case; if the sandbox ends without a reason of the case, once more in a new one."""
        outcome = Outcome("lost")
        for _ in range(2):
            sandbox = holder[0]
            if sandbox is None or not sandbox.alive:
                if sandbox is not None:
                    sandbox.close()
                    self.restarts += 1
                holder[0] = sandbox = Sandbox(self.limits, self.packages)
            outcome = execute(sandbox, *args)
            if outcome.end != "lost":
                break
        return outcome

    def check(self) -> None:
        """Start a sandbox, unless one runs.

        Raises:
            SandboxError: programs cannot be isolated here.
        """
        self.map(lambda run, _: run("program", [{"program": ""}], self.limits), [None])

    def close(self) -> None:
        """End all idle sandboxes; later answers start new ones."""
        if self._owner != os.getpid():
            return
        for _ in range(self.workers):
            sandbox = self._idle.get()
            if sandbox is not None:
                sandbox.close()
            self._idle.put(None)
