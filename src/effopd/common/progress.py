"""Progress of a long loop: a bar on a terminal, otherwise an occasional line on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

#: Seconds before the first line, and between lines.
FIRST, EVERY = 5.0, 30.0


class Counted:
    """Progress counter on standard error; a context manager.

    Args:
        total: number of units.
        what: label of the activity.
        unit: name of a unit, in the singular.
        done: units finished earlier; excluded from the estimate of the time left.
        share: share of the work finished earlier in 0–1, if units differ in work; see `update`.
        leave: whether a finished bar stays on the terminal.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, leave: bool = True, share: float = 0.0):
        self._total, self._what, self._unit = total, what, unit
        self._units = f"{unit[:-1]}ces" if unit.endswith("x") else f"{unit}s"  # matrices
        if unit.isupper():  # MB
            self._units = unit
        self._before = self._done = done
        self._share_before = share
        self._share: float | None = None
        self._start = time.monotonic()
        self._next = self._start + FIRST
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, initial=done, leave=leave)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def about(self, what: str) -> None:
        """Change the label of the activity."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def update(self, new: int = 1, share: float | None = None) -> None:
        """Count `new` more finished units.

        Args:
            new: number of units.
            share: share of all work that is finished, 0–1; `None`: units take equally long.
        """
        self._done += new
        self._share = share
        if self._bar is not None:
            self._bar.update(new)
        elif (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """`what: 64/256 answers, 12 s, about 36 s left`, for the elapsed seconds."""
        text = f"{self._what}: {self._done}/{self._total} {self._units}, {spoken_time(seconds)}"
        if self._share is None:
            left = time_left(seconds, self._done - self._before, self._total - self._done)
        else:
            left = time_left(seconds, self._share - self._share_before, 1 - self._share)
        return text + (f", about {spoken_time(left)} left" if left else "")


def time_left(seconds: float, done: float, rest: float) -> float:
    """seconds / done · rest: estimated seconds for the `rest` units; 0 before the first is done."""
    return seconds / done * rest if done else 0.0


def spoken_time(seconds: float) -> str:
    """A duration as text: below 100 s in seconds, below 100 min in minutes, otherwise in hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
