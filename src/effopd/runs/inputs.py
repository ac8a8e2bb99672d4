"""What a run reads besides its teachers: `inputs.json`, in the run directory and its checkpoints.

It has SHA-256 of the training and held-out prompts and of the initial weights, and the shape and
scale of an adapter. Settings name files and folders; these values tell whether their content is
still the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effopd.common.files import write_atomically
from effopd.runs.checkpoints import INPUTS_FILE, reading


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their order.

    Attributes:
        rows: their number.
        sha256: SHA-256 of their JSON texts, one per line.
    """

    rows: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.rows} rows ({self.sha256[:12]})"


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run; `None`: not known, or there are none.

    Attributes:
        train: training prompts.
        held_out: prompts of the evaluations.
        weights: SHA-256 of the initial weights; for an adapter, of the weights below it.
        adapter: shape and scale of the adapters, by name.
    """

    train: PromptSet | None = None
    held_out: PromptSet | None = None
    weights: str | None = None
    adapter: Mapping[str, Any] | None = None


def prompt_set(prompts: Iterable[Any]) -> PromptSet:
    """Number and SHA-256 of prompts: texts or chat messages.

    Example:
        >>> prompt_set(["a", "b"]) == prompt_set(["b", "a"]), prompt_set(["a", "b"]).rows
        (False, 2)
    """
    digest, rows = hashlib.sha256(), 0
    for prompt in prompts:
        digest.update(json.dumps(prompt, sort_keys=True, default=str).encode() + b"\n")
        rows += 1
    return PromptSet(rows, digest.hexdigest())


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Write `inputs.json` into a folder."""
    text = json.dumps(asdict(inputs), indent=1)
    write_atomically(folder / INPUTS_FILE, lambda path: path.write_text(text + "\n"))


def read_inputs(folder: Path) -> Inputs | None:
    """The inputs in a folder's `inputs.json`; `None`: it has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not (folder / INPUTS_FILE).is_file():
        return None
    with reading(folder, INPUTS_FILE):
        row = json.loads((folder / INPUTS_FILE).read_text())
        sets = {name: row[name] and PromptSet(**row[name]) for name in ("train", "held_out")}
        return Inputs(**{**row, **sets})
