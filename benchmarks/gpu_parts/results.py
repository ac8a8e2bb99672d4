"""The result file of a part: one entry per unit, rewritten whenever a unit ends."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu_parts.plan import PARTS, REHEARSAL, Deadline


def read(folder: Path, part: str) -> dict[str, Any]:
    """The result of a part; without a file, one without units."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else {"part": part, "rehearsal": REHEARSAL, "units": {}}


def unfinished(folder: Path, part: str) -> list[str]:
    """Units of a part that have no result yet, or whose result is partial."""
    units = read(folder, part)["units"]
    return [name for name in PARTS[part].units if not units.get(name, {}).get("complete")]


class Results:
    """The results of one part in `folder`, as they come.

    Each unit has `result`, `complete` and `seconds`, or `error` with a traceback.
    """

    def __init__(self, folder: Path, part: str, deadline: Deadline, log: Callable[[str], None] = print):
        self.folder, self.part, self.deadline, self.log = folder, part, deadline, log
        self.content = read(folder, part) | {"rehearsal": REHEARSAL, "machine": machine()}

    def run(self, unit: str, measure: Callable[[], dict[str, Any]], least: float = 0.0) -> None:
        """Store the result or the error of a unit, unless it is there; never raises an `Exception`.

        Args:
            measure: returns the result.
            least: seconds without which the unit is left for the next call.
        """
        if self.content["units"].get(unit, {}).get("complete"):
            return
        if self.deadline.remaining < least:
            self.log(f"{self.part}: {unit}: left for the next call, {self.deadline.remaining:.0f} s remain")
            return
        start = time.perf_counter()
        try:
            self.put(unit, measure(), seconds=time.perf_counter() - start)
        except Exception:
            self.content["units"][unit] = {"error": traceback.format_exc()[-4000:]}
            self.save()
            self.log(f"{self.part}: {unit}: FAILED\n{traceback.format_exc()}")

    def put(self, unit: str, result: dict[str, Any], *, seconds: float, complete: bool = True) -> None:
        """Store a result; a partial one is measured again by the next call."""
        self.content["units"][unit] = {"result": result, "complete": complete, "seconds": round(seconds, 2)}
        self.save()
        self.log(f"{self.part}: {unit}: {'done' if complete else 'partial'} after {seconds:.1f} s")

    def result(self, unit: str) -> dict[str, Any] | None:
        """The stored result of a unit."""
        return self.content["units"].get(unit, {}).get("result")

    def save(self) -> None:
        """Write the file; it is complete at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.part}.json"
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1, ensure_ascii=False, default=float) + "\n")
        os.replace(scratch, path)


def machine() -> dict[str, Any]:
    """The device and the versions that a result depends on."""
    import torch

    from effopd.common.versions import versions

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "versions": versions(("torch", "transformers", "trl", "accelerate", "peft")),
        "date": time.strftime("%Y-%m-%d"),
    }


def device() -> str:
    """`cuda`, or in a rehearsal `cpu`.

    Raises:
        RuntimeError: there is no GPU and this is no rehearsal.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if REHEARSAL:
        return "cpu"
    raise RuntimeError("no NVIDIA GPU: expected torch.cuda.is_available(). GPU_REHEARSAL=1 runs on the CPU.")


def failed(folder: Path, parts: Iterable[str]) -> list[str]:
    """`part: unit` of every unit with an error."""
    return [
        f"{part}: {unit}" for part in parts for unit, entry in read(folder, part)["units"].items() if "error" in entry
    ]
