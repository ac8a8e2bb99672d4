"""When to look ahead: pure functions of the optimizer step and the searches so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: The longest wait of the adaptive schedule, in steps.
LONGEST = 8


def powers_of_two(step: int) -> bool:
    """Whether `step` is 1, 2, 4, 8, … (arXiv 2605.11739).

    Example:
        >>> [t for t in range(20) if powers_of_two(t)]
        [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


def adaptive(step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether enough steps have passed since the last search: 1 after a jump of at least the displacement itself (s ≥ 1),
    else twice as many as the time before, up to 8, and up to 4 after a step back (s < 0).

    So it searches at every step while jumps pay, comes back soon where training overshoots, and hardly costs anything
    where the steps are right. A search that found no
    displacement to look along (a warm-up from rate 0, a new stage of training) says nothing and changes nothing.

    Args:
        history: earlier searches, each with `step`, `accepted_scale` and `trials`.
    """
    wait, last = 1, 0
    for row in history:
        if len(row["trials"]) > 1:
            scale = row["accepted_scale"]
            wait = 1 if scale >= 1 else min(2 * wait, LONGEST if scale >= 0 else LONGEST // 2)
        last = row["step"]
    return step >= last + wait


SCHEDULES: dict[str, Callable[[int, Sequence[Mapping[str, Any]]], bool]] = {
    "powers_of_two": lambda step, history: powers_of_two(step),
    "every_step": lambda step, history: step > 0,
    "adaptive": adaptive,
}
