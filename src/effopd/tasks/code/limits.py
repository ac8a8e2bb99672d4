"""Limits of a program's execution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from effopd.errors import TaskError

_MIB = 1 << 20
#: Smallest values with which Python starts.
_LEAST = {"memory_mb": 64, "processes": 3, "open_files": 16}


@dataclass(frozen=True)
class Limits:
    """Limits per case; `total_seconds` is per answer.

    Attributes:
        seconds: wall-clock and CPU time of a case. A row's own limit replaces it.
        total_seconds: wall-clock time of all cases of an answer.
        memory_mb: memory of one process (address space) and of all of them (resident), in MiB. A
            row's own limit replaces it if it is larger.
        processes: processes and threads at the same time, including two of the sandbox.
        file_mb: size of a file that the program writes, in MiB.
        folder_mb: size of the writable folder `/tmp`, in MiB; in memory.
        output_mb: size of standard output, in MiB.
        open_files: open descriptors of a process.

    Raises:
        TaskError: a value is not a number above 0, or too small to start Python.

    Example:
        >>> Limits(seconds=1.5).resources()["cpu"]
        2
    """

    seconds: float = 5.0
    total_seconds: float = 60.0
    memory_mb: int = 1024
    processes: int = 16
    file_mb: int = 16
    folder_mb: int = 64
    output_mb: int = 8
    open_files: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 0)
            whole = field.name not in ("seconds", "total_seconds")
            bad = isinstance(value, bool) or not isinstance(value, int if whole else int | float)
            if bad or not (least <= value < math.inf) or value <= 0:
                kind = "a whole number" if whole else "a number"
                raise TaskError(
                    f"task_args: {field.name}: expected {kind} {f'of at least {least}' if least else 'above 0'}, got "
                    f"{value!r}. The default is {field.default!r}."
                )

    def for_row(self, limits: Mapping[str, Any]) -> Limits:
        """Limits with a row's own `seconds` and `memory_mb`."""
        seconds, memory = limits.get("seconds"), limits.get("memory_mb")
        return replace(
            self,
            seconds=self.seconds if seconds is None else seconds,
            memory_mb=self.memory_mb if memory is None else max(self.memory_mb, math.ceil(memory)),
        )

    def resources(self) -> dict[str, int]:
        """Resource limits of a process: bytes, whole CPU seconds (rounded up) and counts."""
        return {
            "cpu": max(1, math.ceil(self.seconds)),
            "address_space": self.memory_mb * _MIB,
            "file_size": self.file_mb * _MIB,
            "open_files": self.open_files,
            "processes": self.processes,
        }
