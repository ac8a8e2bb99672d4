"""CLPD: stages of increasing difficulty, each with prompts and a teacher of its own.

    difficulty of every row  →  sort and cut into n equal stages  →  stage of step k = ⌊k · n / S⌋

S is the number of optimizer steps. Every stage has S/n steps on its own rows, in passes without
replacement; a pass that cannot fill a batch is dropped, as at the end of an epoch. With one stage
the rows and their order are those of a run without a curriculum.

The paper is known to us by its abstract only. Our choices: stages of equal numbers of rows and of
steps, three stages by default, and on-policy rollouts.

Source: arXiv 2605.11260.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effopd.errors import TaskError
from effopd.tasks.row_columns import field_of

#: Measures of difficulty; `column:NAME` reads a column or nested field, also of the metadata.
MEASURES = ("prompt_length", "answer_length", "nll")
#: Those of the reference answer.
OF_ANSWERS = ("answer_length", "nll")
COLUMN = "column:"
ORDERS = ("easy_first", "hard_first", "shuffled")


def stage_of(step: int, total_steps: int, stages: int, shared: int = 1) -> int:
    """Stage, from 0, of the step after `step` steps.

    Args:
        shared: steps that share rollouts; a stage starts with new rollouts.

    Example:
        >>> [stage_of(step, 8, 3) for step in range(9)]
        [0, 0, 0, 1, 1, 1, 2, 2, 2]
    """
    return min(stages - 1, step // shared * stages // math.ceil(total_steps / shared))


def cut(difficulty: Sequence[float], stages: int, order: str, seed: int) -> list[list[int]]:
    """Rows of each stage, in the order of training: of equal numbers, each stage sorted.

    Args:
        difficulty: one value per row; equal values keep the order of the rows.
        order: one of `ORDERS`. "shuffled": rows are assigned at random, by `seed`.

    Example:
        >>> cut([3, 1, 2, 0], 2, "easy_first", 0), cut([3, 1, 2, 0], 2, "hard_first", 0)
        ([[3, 1], [2, 0]], [[0, 2], [1, 3]])
    """
    rows = sorted(range(len(difficulty)), key=lambda row: (difficulty[row], row))
    if order == "hard_first":
        rows.reverse()
    if order == "shuffled":
        random.Random(seed).shuffle(rows)
    bounds = [stage * len(rows) // stages for stage in range(stages + 1)]
    return [rows[low:high] for low, high in itertools.pairwise(bounds)]


def stage_batches(stages: Sequence[Sequence[int]], batch: int, total: int, count: int, seed: int | None) -> list[int]:
    """The rows of the first `count` batches, batch after batch.

    Args:
        stages: rows of each stage (`cut`), at least `batch` each.
        batch: rows per batch.
        total: number of batches of the run, which the stages share equally.
        seed: every pass over a stage is shuffled with `seed` + the number of earlier passes, as TRL
            shuffles its epochs. `None`: passes follow the order of `stages`.
    """
    made: list[int] = []
    queue: list[int] = []
    current, passes, at = -1, 0, 0
    for index in range(count):
        stage = stage_of(index, total, len(stages))
        if stage != current or at + batch > len(queue):
            queue, current, at = list(stages[stage]), stage, 0
            if seed is not None:
                order = torch.randperm(len(queue), generator=torch.Generator().manual_seed(seed + passes)).tolist()
                rows = sorted(queue)
                queue = [rows[place] for place in order]
            passes += 1
        made += queue[at : at + batch]
        at += batch
    return made


def row_difficulty(measure: str, row: Mapping[str, Any]) -> float:
    """Difficulty of a row: characters of its prompt or answer, or the number in a column.

    For "nll" the value is 0: the student measures it. The row must have an answer.

    Args:
        measure: one of `MEASURES`, or `column:NAME`.
        row: `prompt`, `answer`, `metadata` (a mapping or JSON text) and other columns.

    Raises:
        TaskError: the row has no answer, or no finite number in the column.
    """
    if measure == "prompt_length":
        prompt = row["prompt"]
        return float(len(prompt if isinstance(prompt, str) else "".join(str(m["content"]) for m in prompt)))
    if measure in OF_ANSWERS:
        answer = row.get("answer")
        if answer is None or not str(answer):
            raise TaskError(
                f"curriculum={measure!r} needs a reference answer in every row, but row {row.get('id', '?')} has "
                "none. Use --curriculum prompt_length, or a column of the data."
            )
        return float(len(str(answer))) if measure == "answer_length" else 0.0
    name = measure.removeprefix(COLUMN)
    metadata = _metadata(row)
    value = field_of({**metadata, **row}, name)
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        known = sorted({*row, *metadata} - {"id", "prompt", "metadata"})
        raise TaskError(
            f"curriculum={measure!r} needs a finite number in column '{name}' of every row, but row "
            f"{row.get('id', '?')} has {value!r}. The row has {', '.join(known) or 'no other columns'}."
        ) from None
    return number


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Columns in `metadata`, as `Task.to_dataset` writes them; none if it holds something else."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return {}
    return metadata if isinstance(metadata, Mapping) else {}
