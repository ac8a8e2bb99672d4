"""Faults in rows, collected one by one and raised together."""

from __future__ import annotations

from typing import Any

from effopd.errors import TaskError

#: Metadata key of an example's origin, e.g. "data/train.jsonl row 12".
ORIGIN = "_origin"
#: Fault in a row: expected, got, fix.
Fault = tuple[str, str, str]
#: Maximum number of faults listed in a message.
_SHOWN = 20


class RowFaults:
    """Faults in the rows of a source, raised in one error.

    Args:
        source: file or dataset of the rows.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, origin: str, expected: str, got: str, fix: str) -> None:
        """Record one fault of the row at `origin`."""
        self.lines.append(f"{origin}: expected {expected}, got {got}. {fix}")

    def raise_if_any(self) -> None:
        """Raise all recorded faults; the message lists the first 20.

        Raises:
            TaskError: at least one fault was recorded.
        """
        if not self.lines:
            return
        shown = "\n  ".join(self.lines[:_SHOWN])
        more = f"\n  … and {len(self.lines) - _SHOWN} more" if len(self.lines) > _SHOWN else ""
        count = f"{len(self.lines)} bad row" + ("s" if len(self.lines) > 1 else "")
        raise TaskError(f"{count} in '{self.source}'; no row was left out or changed:\n  {shown}{more}")


class BadRow:
    """Placeholder for a row that cannot be used, with its fault."""

    def __init__(self, expected: str, got: str, fix: str) -> None:
        self.fault: Fault = (expected, got, fix)


class NoPrompt(BadRow):
    """Row without exactly one prompt column."""


def kind_of(value: Any) -> str:
    """Type and first 60 characters of a value, for messages."""
    return f"{type(value).__name__} {str(value)[:60]!r}"
