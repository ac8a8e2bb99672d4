"""When to look ahead: pure functions of the optimizer step and the searches so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class PastSearch(Protocol):
    """What the schedule reads of an earlier search."""

    @property
    def step(self) -> int:
        """The optimizer step after which it searched."""

    @property
    def accepted_scale(self) -> float:
        """Where the model went."""

    @property
    def searched(self) -> bool:
        """Whether a candidate was tried besides the start."""


#: The longest wait of the adaptive schedule, in steps.
LONGEST = 8


def powers_of_two(step: int) -> bool:
    """Whether `step` is 1, 2, 4, 8, … (arXiv 2605.11739).

    Example:
        >>> [t for t in range(20) if powers_of_two(t)]
        [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


def adaptive(step: int, history: Sequence[PastSearch]) -> bool:
    """Whether enough steps have passed since the last search.

    The wait is 1 step after a jump of at least the displacement itself (s ≥ 1). Otherwise it
    doubles, up to 8 steps, and up to 4 after a step back (s < 0). A search that tried no candidate,
    because nothing had moved, leaves the wait as it was.

    So searches follow every step while jumps pay, come back soon where training overshoots, and
    cost little where the steps are right.

    Args:
        history: the searches so far.
    """
    wait, last = 1, 0
    for search in history:
        if search.searched:
            scale = search.accepted_scale
            wait = 1 if scale >= 1 else min(2 * wait, LONGEST if scale >= 0 else LONGEST // 2)
        last = search.step
    return step >= last + wait


SCHEDULES: dict[str, Callable[[int, Sequence[PastSearch]], bool]] = {
    "powers_of_two": lambda step, history: powers_of_two(step),
    "every_step": lambda step, history: step > 0,
    "adaptive": adaptive,
}
