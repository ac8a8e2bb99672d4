"""Cost ledger: seconds and tokens of a run by category.

Every second of training belongs to exactly one category, so the categories add up to the whole.
`net` is everything except evaluation; all published speed-ups are ratios of net costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

CATEGORIES = ("rollout", "teacher", "update", "search", "eval", "other")
_NET = tuple(category for category in CATEGORIES if category != "eval")
_GENERATING = ("rollout", "search", "eval")
_FORWARDING = ("teacher", "update", "search", "eval")


def synchronized_clock() -> float:
    """`time.perf_counter()` after a device synchronization.

    Kernels are then charged to the category that queued them.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


#: `cost_clock` → clock: wall-clock seconds, or CPU seconds of this process (all threads).
CLOCKS: dict[str, Callable[[], float]] = {"wall": synchronized_clock, "cpu": time.process_time}


class CostLedger:
    """Seconds and tokens by category; opening an inner category pauses the outer one.

    Args:
        clock: returns seconds; replaced in tests.

    Example:
        >>> ledger = CostLedger(clock=iter(range(9)).__next__)
        >>> ledger.start()                          # clock 0: `other` runs
        >>> with ledger.track("update"):            # 1
        ...     with ledger.track("teacher"):       # 2 to 3
        ...         pass
        >>> ledger.seconds["update"], ledger.seconds["teacher"]   # 1→2 and 3→4; 2→3
        (2.0, 1.0)
    """

    def __init__(self, clock: Callable[[], float] = synchronized_clock):
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0
        self.reset()

    def reset(self) -> None:
        """Set all totals to 0."""
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.generated_tokens = dict.fromkeys(CATEGORIES, 0)
        self.forward_tokens = dict.fromkeys(CATEGORIES, 0)
        #: The teacher's part of `forward_tokens["search"]`; `None`: resumed from totals without it.
        self.search_teacher_tokens: int | None = 0

    def start(self) -> None:
        """Start or restart the clock in category `other`; closes all open categories."""
        self._since = self._clock()
        self._open = ["other"]

    def stop(self) -> None:
        """Stop the clock."""
        self._charge()
        self._open = []

    def push(self, category: str) -> None:
        """Open a category and pause the current one; without `start()` this does nothing."""
        if category not in CATEGORIES:
            raise KeyError(f"unknown cost category {category!r}; known: {', '.join(CATEGORIES)}")
        if self._open:
            self._charge()
            self._open.append(category)

    def pop(self) -> None:
        """Close the category that was opened last."""
        if len(self._open) > 1:
            self._charge()
            self._open.pop()

    @contextmanager
    def track(self, category: str) -> Iterator[None]:
        """`push` for the length of a block."""
        self.push(category)
        depth = len(self._open)
        try:
            yield
        finally:
            if len(self._open) == depth:
                self.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block, charge no category."""
        self._charge()
        try:
            yield
        finally:
            self._since = self._clock()

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """In this block, charge neither seconds nor tokens, in whatever categories it opens."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)
            self._since = self._clock()

    @contextmanager
    def charged(self, category: str) -> Iterator[None]:
        """Charge this block to a category, also before `start()`."""
        running = bool(self._open)
        if not running:
            self.start()
        try:
            with self.track(category):
                yield
        finally:
            if not running:
                self.stop()

    def count(self, category: str, *, generated: int = 0, forward: int = 0, search_teacher: int = 0) -> None:
        """Add sampled tokens (`generated`) and tokens of other forward passes (`forward`).

        `search_teacher` is the teacher's part of `forward` in category `search`.
        """
        self.generated_tokens[category] += int(generated)
        self.forward_tokens[category] += int(forward)
        if self.search_teacher_tokens is not None:
            self.search_teacher_tokens += int(search_teacher)

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def snapshot(self) -> dict[str, float]:
        """Cumulative costs as flat metrics, described in `records.Costs`.

        Keys: `cost/{category}_{unit}` and `cost/net_{unit}`, with unit `seconds`,
        `generated_tokens` or `forward_tokens`. `net` leaves out evaluation.
        `cost/search_teacher_tokens` is part of `cost/search_forward_tokens`.
        """
        self._charge()
        tables: tuple[tuple[str, Mapping[str, float], tuple[str, ...]], ...] = (
            ("seconds", self.seconds, CATEGORIES),
            ("generated_tokens", self.generated_tokens, _GENERATING),
            ("forward_tokens", self.forward_tokens, _FORWARDING),
        )
        flat = {f"cost/{c}_{unit}": values[c] for unit, values, categories in tables for c in categories}
        if self.search_teacher_tokens is not None:
            flat["cost/search_teacher_tokens"] = self.search_teacher_tokens
        for unit, values, _ in tables:
            flat[f"cost/net_{unit}"] = sum(values[category] for category in _NET)
        return flat

    def state_dict(self) -> dict[str, Any]:
        """The totals so far."""
        self._charge()
        return {
            "seconds": dict(self.seconds),
            "generated_tokens": dict(self.generated_tokens),
            "forward_tokens": dict(self.forward_tokens),
            "search_teacher_tokens": self.search_teacher_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved totals."""
        self.seconds.update(state["seconds"])
        self.generated_tokens.update(state["generated_tokens"])
        self.forward_tokens.update(state["forward_tokens"])
        self.search_teacher_tokens = _search_teacher_tokens(state)

    def add(self, state: Mapping[str, Any], *, tokens: bool) -> None:
        """Merge the saved totals of another process: seconds of the slower one, sum of tokens.

        The slower one has more net seconds. The maximum of every category would add up to more than
        any process took.

        Args:
            tokens: whether to add the tokens.
        """
        for part in (_NET, ("eval",)):
            theirs = {category: state["seconds"][category] for category in part}
            if sum(theirs.values()) > sum(self.seconds[category] for category in part):
                self.seconds |= theirs
        if tokens:
            for category in CATEGORIES:
                self.generated_tokens[category] += state["generated_tokens"][category]
                self.forward_tokens[category] += state["forward_tokens"][category]
            both = (self.search_teacher_tokens, _search_teacher_tokens(state))
            self.search_teacher_tokens = None if None in both else sum(both)  # type: ignore[arg-type]


def _search_teacher_tokens(state: Mapping[str, Any]) -> int | None:
    """The saved count; states without it count 0 if no search made a forward pass."""
    return state.get("search_teacher_tokens", None if state["forward_tokens"]["search"] else 0)


class LedgerCallback(TrainerCallback):
    """Opens `update` during an optimizer step. Must run before every other callback."""

    def __init__(self, ledger: CostLedger):
        self._ledger = ledger

    def on_step_begin(self, args, state, control, **kwargs):
        self._ledger.push("update")

    def on_step_end(self, args, state, control, **kwargs):
        self._ledger.pop()

    def on_train_end(self, args, state, control, **kwargs):
        self._ledger.stop()


class StartLedgerCallback(TrainerCallback):
    """Starts the clock when training starts, so that set-up (loading, checks) is not counted."""

    def __init__(self, ledger: CostLedger):
        self._ledger = ledger

    def on_train_begin(self, args, state, control, **kwargs):
        self._ledger.start()
