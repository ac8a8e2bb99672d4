"""When to look ahead: pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable


def powers_of_two(step: int) -> bool:
    """Whether `step` is 1, 2, 4, 8, … (arXiv 2605.11739).

    Example:
        >>> [t for t in range(20) if powers_of_two(t)]
        [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


SCHEDULES: dict[str, Callable[[int], bool]] = {"powers_of_two": powers_of_two}
