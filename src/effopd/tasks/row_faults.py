"""What is wrong with rows: noted one by one, raised together."""

from __future__ import annotations

from typing import Any

from effopd.errors import TaskError

#: Metadata key with where an example came from, e.g. "data/train.jsonl row 12".
ORIGIN = "_origin"
#: What is wrong with a row: expected, got, how to fix it.
Fault = tuple[str, str, str]
#: Faults that a message lists.
_SHOWN = 20


class RowFaults:
    """Collects what is wrong with rows and raises it all at once.

    Args:
        source: file or dataset the rows came from.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, origin: str, expected: str, got: str, fix: str) -> None:
        """Note one fault of the row at `origin`."""
        self.lines.append(f"{origin}: expected {expected}, got {got}. {fix}")

    def raise_if_any(self) -> None:
        """Raise every fault noted so far (the first 20 in words).

        Raises:
            TaskError: at least one was noted.
        """
        if not self.lines:
            return
        shown = "\n  ".join(self.lines[:_SHOWN])
        more = f"\n  … and {len(self.lines) - _SHOWN} more" if len(self.lines) > _SHOWN else ""
        count = f"{len(self.lines)} bad row" + ("s" if len(self.lines) > 1 else "")
        raise TaskError(f"{count} in '{self.source}'; no row was left out or changed:\n  {shown}{more}")


class BadRow:
    """Stands where a row should be."""

    def __init__(self, expected: str, got: str, fix: str) -> None:
        self.fault: Fault = (expected, got, fix)


class NoPrompt(BadRow):
    """A row without one column that is the prompt."""


def kind_of(value: Any) -> str:
    """A value in a message: its type, and how it begins."""
    return f"{type(value).__name__} {str(value)[:60]!r}"
