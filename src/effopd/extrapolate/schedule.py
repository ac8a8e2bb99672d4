"""Schedules of searches: pure functions of the optimizer step and the past searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class PastSearch(Protocol):
    """Fields of a past search that a schedule reads."""

    @property
    def step(self) -> int:
        """Optimizer step after which it ran."""

    @property
    def accepted_scale(self) -> float:
        """Accepted scale s; 0 if the model stayed."""

    @property
    def searched(self) -> bool:
        """Whether it tried a candidate besides the start."""


#: Longest interval of the adaptive schedule, in steps.
LONGEST = 8


def powers_of_two(step: int) -> bool:
    """Whether `step` is 1, 2, 4, 8, … (arXiv 2605.11739).

    Example:
        >>> [t for t in range(20) if powers_of_two(t)]
        [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


def adaptive(step: int, history: Sequence[PastSearch]) -> bool:
    """Whether the interval since the last search has passed.

    The interval is 1 step after a jump of s ≥ 1. Otherwise it doubles, up to 8 steps, or up to 4
    after a backward jump (s < 0). A search without candidates (the weights equaled the anchor)
    leaves it unchanged.

    Searches are therefore frequent while jumps are accepted, and rare while they are not.

    Args:
        step: optimizer step.
        history: searches so far.
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
