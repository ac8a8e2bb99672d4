"""Parts in order of worth, their units and time limits; standard library only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

#: Tiny sizes on the CPU.
REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"


@dataclass(frozen=True)
class Part:
    """A part runs in a process of its own; a unit is the smallest result that is stored.

    Attributes:
        units: names of the units, in order of worth.
        least: seconds without which the part is not started; kept free for it by earlier parts.
        most: its time limit in seconds.
        model: whether it needs SmolLM2-135M.
    """

    units: tuple[str, ...]
    least: float
    most: float
    model: bool = False


#: Runs of the comparison, in order of worth: name → learning rate and strategy.
_ARMS: dict[str, tuple[float, str]] = {
    "plain 3e-5": (3e-5, "none"),
    "line_search 3e-6": (3e-6, "line_search"),
    "line_search 3e-5": (3e-5, "line_search"),
    "plain 1e-5": (1e-5, "none"),
    "line_search 1e-4": (1e-4, "line_search"),
    "plain 1e-4": (1e-4, "none"),
}
#: A rehearsal takes the first two.
ARMS = dict(list(_ARMS.items())[:2]) if REHEARSAL else _ARMS

PARTS: dict[str, Part] = {
    "tests": Part(("pytest",), least=60, most=180),
    "steps_random": Part(
        ("moves", "plain bf16", "line_search bf16", "line_search bf16, anchor in host memory"), least=60, most=150
    ),
    "steps_smollm2": Part(
        ("plain fp32", "line_search bf16")
        if REHEARSAL
        else ("plain bf16", "line_search bf16", "plain fp32", "line_search fp32"),
        least=60,
        most=150,
        model=True,
    ),
    "comparison": Part(("teacher", *ARMS), least=120, most=520, model=True),
    "spectra": Part(("2048 × 6144", "4096 × 12288"), least=40, most=90),
}


def allowed(part: str, later: Iterable[str], remaining: float) -> float:
    """Seconds that a part may take: the rest of the call, less the least of the later parts.

    0 if that is less than the part's own least.
    """
    seconds = min(PARTS[part].most, remaining - sum(PARTS[name].least for name in later))
    return seconds if seconds >= PARTS[part].least else 0.0


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._end - time.monotonic())
