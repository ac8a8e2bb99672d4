"""The targets of a grid, the baseline's best learning rates for them, and what every run had cost
when it got there.

Targets, for each task and seed (so that prompts and noise are paired):

    reference_kl        the baseline's final smoothed held-out reverse KL at the reference learning rate
    best_kl             the same at the learning rate where the baseline ends lowest (median over seeds)
    gap_90              a tenth of the held-out reverse KL at step 0: 90 % of the way to the teacher
    reference_accuracy  the baseline's final smoothed accuracy at the reference learning rate

The best learning rate for a target is the one at which the baseline gets there in the smallest
median seconds (a run that never does counts as ∞; ties go to the lower final KL). Rates are ranked
on the seeds that all of them have, the very seeds they are judged on, which favours the baseline.
Every run's cost is that of its own first evaluation at the target, the baseline's too: a run like
the baseline is 1×, not faster because the baseline's last steps brought nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from effopd.compare.grid_run import Arm, GridRun, Place
from effopd.compare.roles import Roles
from effopd.compare.time_to_target import Cost, final_target

#: Target → (metric, higher is better).
TARGETS = {
    "reference_kl": ("kl", False),
    "best_kl": ("kl", False),
    "gap_90": ("kl", False),
    "reference_accuracy": ("accuracy", True),
}
#: Stands for the seconds of a run that never arrives: more than any run takes.
_SECONDS_IF_NEVER = 1e15

#: (task, seed) → target → value.
TargetValues = Mapping[Place, Mapping[str, float]]


@dataclass(frozen=True)
class Targets:
    """What the runs of a grid are asked for.

    Attributes:
        values: of every target that a task and seed has.
        best_rate: task → target → the baseline's best learning rate.
        lowest_rate: task → the learning rate where the baseline ends lowest.
        costs: (arm, place) → target → the run's cost there, `None` if it never arrives.
    """

    values: TargetValues
    best_rate: Mapping[str, Mapping[str, float | None]]
    lowest_rate: Mapping[str, float | None]
    costs: Mapping[tuple[Arm, Place], Mapping[str, Cost | None]]


def find_targets(runs: Sequence[GridRun], roles: Roles) -> Targets:
    """The targets of a grid's runs, and every run's costs."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    baseline = [run for run in runs if run.strategy == roles.baseline]
    lowest = {task: _best_rate(baseline, task, lambda run: final_target(run.evaluations)) for task in tasks}
    values = {run.place: _reference_values(run) for run in runs if run.arm == roles.reference}
    for run in baseline:
        if run.learning_rate == lowest[run.task] and run.place in values:
            values[run.place] |= _finite({"best_kl": final_target(run.evaluations)})
    best = {task: {name: _fastest_rate(baseline, task, values, name) for name in TARGETS} for task in tasks}
    costs = {
        (run.arm, run.place): {
            name: run.cost(value, *TARGETS[name]) for name, value in values.get(run.place, {}).items()
        }
        for run in runs
    }
    return Targets(values, best, lowest, costs)


def _reference_values(run: GridRun) -> dict[str, float]:
    """The targets that a run of the reference arm sets; one that diverged sets none."""
    start = run.evaluations[0].kl
    assert start is not None
    return _finite({
        "reference_kl": final_target(run.evaluations),
        "reference_accuracy": final_target(run.evaluations, "accuracy"),
        "gap_90": 0.1 * start,
    })  # fmt: skip


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _best_rate(runs: Sequence[GridRun], task: str, cost: Callable[[GridRun], float]) -> float | None:
    """The learning rate of the smallest median cost, over the seeds that all rates have; NaN costs
    are left out.
    """
    rates: dict[float, list[GridRun]] = {}
    for run in runs:
        if run.task == task:
            rates.setdefault(run.learning_rate, []).append(run)
    seeds = set.intersection(*({run.seed for run in of_rate} for of_rate in rates.values())) if rates else set()
    medians = []
    for rate, of_rate in rates.items():
        costs = [value for run in of_rate if run.seed in seeds and not math.isnan(value := cost(run))]
        if costs:
            medians.append((statistics.median(costs), rate))
    return min(medians)[1] if medians else None


def _fastest_rate(runs: Sequence[GridRun], task: str, values: TargetValues, target: str) -> float | None:
    """The baseline's best learning rate for a target."""

    def seconds(run: GridRun) -> float:
        if target not in values.get(run.place, {}):
            return math.nan
        cost = run.cost(values[run.place][target], *TARGETS[target])
        if cost is not None:
            return cost.seconds
        return _SECONDS_IF_NEVER * (1 + min(final_target(run.evaluations), 1e3))  # ties go to the lower final KL

    return _best_rate(runs, task, seconds)
