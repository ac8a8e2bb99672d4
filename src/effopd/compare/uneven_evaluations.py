"""Strategies of a plan whose costs to a target are not comparable: evaluated at other steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effopd.compare.grid import Grid
from effopd.compare.time_to_target import WINDOW

#: Settings that give a step the same size, and those that place the evaluations.
_SIZE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "updates_per_rollouts", "num_mini_batches",
    "num_generations",
)  # fmt: skip
_SPACING = ("eval_strategy", "eval_steps", "eval_log_spacing")


def uneven_evaluations(grid: Grid) -> list[str]:
    """One remark per group of strategies with steps of equal size that evaluate at other steps.

    A target counts from the second of `WINDOW` = 3 evaluations on that is below it. A run with an
    evaluation every n steps can therefore seem up to 2n steps later than it is, and one with fewer
    of them loses against an equal one.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, None]]] = {}
    for run in grid.runs():
        size = run.task, *(run.settings.get(key) for key in _SIZE)
        groups.setdefault(size, {}).setdefault(_spacing(run.settings), {})[run.strategy] = None
    remarks = (
        "Not evaluated at the same steps: "
        + "; ".join(f"{', '.join(names)} {spacing}" for spacing, names in group.items())
        + f". A target counts from the second of {WINDOW} evaluations on that is below it, so rarer evaluations find "
        "it later. Give strategies that are compared with each other the same eval_steps."
        for group in groups.values()
        if len(group) > 1
    )
    return list(dict.fromkeys(remarks))  # tasks mostly share their settings


def _spacing(settings: Mapping[str, Any]) -> str:
    strategy, steps, log_spaced = (settings.get(key) for key in _SPACING)
    if strategy == "epoch":
        return "once per epoch"
    return f"every {'logging_steps' if steps is None else steps} steps" + (
        " at most, log-spaced" if log_spaced else ""
    )
