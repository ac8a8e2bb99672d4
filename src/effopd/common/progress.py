"""How far a long loop is: a bar on a terminal, now and then a line where standard error goes to a
file.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

#: Seconds before the first line, and between two of them.
FIRST, EVERY = 5.0, 30.0


class Counted:
    """Counts towards a total and shows it on standard error. A context manager; `update` takes the
    number of new ones.

    Args:
        total: how many there are.
        what: what is being done.
        unit: what is counted, in the singular.
        done: how many were there before; they say nothing about the time that is left.
        leave: whether a finished bar stays on the terminal.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, leave: bool = True):
        self._total, self._what, self._unit = total, what, unit
        self._units = f"{unit[:-1]}ces" if unit.endswith("x") else f"{unit}s"  # matrices
        self._before = self._done = done
        self._start = time.monotonic()
        self._next = self._start + FIRST
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, initial=done, leave=leave)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def about(self, what: str) -> None:
        """Name what is being done from now on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def update(self, new: int = 1) -> None:
        """`new` more are done."""
        self._done += new
        if self._bar is not None:
            self._bar.update(new)
        elif (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """`what: 64/256 answers, 12 s, about 36 s left`, after so many seconds."""
        text = f"{self._what}: {self._done}/{self._total} {self._units}, {spoken_time(seconds)}"
        left = time_left(seconds, self._done - self._before, self._total - self._done)
        return text + (f", about {spoken_time(left)} left" if left else "")


def time_left(seconds: float, done: int, rest: int) -> float:
    """Seconds that `rest` more take at the pace of those that are done; 0 if it is not known
    yet.
    """
    return seconds / done * rest if done else 0.0


def spoken_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
