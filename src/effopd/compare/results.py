"""Contents of results.json: time to target, speed-ups, areas, final values, search shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from effopd.common.versions import versions
from effopd.compare.grid_run import AXES, GridRun, finite, from_row, to_row
from effopd.compare.quality import area, quality_rows
from effopd.compare.roles import Roles
from effopd.compare.speedups import speedup_rows
from effopd.compare.targets import TARGETS, find_targets
from effopd.compare.time_to_target import WINDOW, Cost, final_target, smoothed


def analyze_runs(runs: Sequence[GridRun], roles: Roles) -> dict[str, Any]:
    """Contents of results.json. For unfinished grids, existing pairs are used and counted.

    Curves are rounded first, so that an analysis of the written file gives the same results.
    """
    runs = [from_row(to_row(run)) for run in runs]
    tasks = list(dict.fromkeys(run.task for run in runs))
    arms = list(dict.fromkeys(run.arm for run in runs))
    by_arm = {(run.arm, run.place): run for run in runs}
    targets = find_targets(runs, roles)
    budgets = {run.place: Cost.of(run.evaluations[-1]) for run in runs if run.arm == roles.reference}
    return {
        "versions": versions(),
        "settings": roles.to_settings() | {"smoothing_window": WINDOW},
        "best_learning_rate": targets.best_rate,
        "lowest_learning_rate": targets.lowest_rate,
        "swept": {
            task: sorted({run.learning_rate for run in runs if run.task == task and run.strategy == roles.baseline})
            for task in tasks
        },
        "runs": [
            _run_row(run, targets.values.get(run.place, {}), targets.costs[run.arm, run.place], budgets.get(run.place))
            for run in runs
        ],
        "speedups": speedup_rows(arms, tasks, roles, targets),
        "quality": quality_rows(arms, tasks, by_arm, roles, targets),
    }


def _run_row(
    run: GridRun, targets: Mapping[str, float], costs: Mapping[str, Cost | None], budget: Cost | None
) -> dict[str, Any]:
    """A run with its final values, areas and targets.

    Areas are taken over the budget of the reference run of the same task and seed.
    """
    last = run.evaluations[-1].costs
    row = to_row(run) | {
        "final_kl": finite(final_target(run.evaluations)),
        "final_accuracy": finite(final_target(run.evaluations, "accuracy")),
        "net_seconds": last.net_seconds,
        "generated_tokens": last.net_generated_tokens,
        "forward_tokens": last.net_forward_tokens,
        "search_share": run.search_share(),
        "auc_steps": finite(area(run, "steps", budget.steps)) if budget else None,
        "auc_seconds": finite(area(run, "seconds", budget.seconds)) if budget else None,
    }
    row["targets"] = {name: _target_row(run, name, value, costs[name]) for name, value in targets.items()}
    return row


def _target_row(run: GridRun, target: str, value: float, cost: Cost | None) -> dict[str, Any]:
    costs = dict.fromkeys(AXES) if cost is None else asdict(cost)
    return {
        "value": value,
        "reached": cost is not None,
        **costs,
        "above_again": _above_again(run, target, value, cost),
    }


def _above_again(run: GridRun, target: str, value: float, cost: Cost | None) -> float | None:
    """Share (0–1) of smoothed evaluations after the first at the target that miss it again."""
    if cost is None:
        return None
    metric, higher_is_better = TARGETS[target]
    sign = -1.0 if higher_is_better else 1.0
    later = [
        sign * smooth_value > sign * value
        for evaluation, smooth_value in zip(run.evaluations, smoothed(run.evaluations, metric), strict=True)
        if evaluation.step > cost.steps
    ]
    return sum(later) / len(later) if later else 0.0
