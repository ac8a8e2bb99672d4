"""Targets of a grid, the baseline's best learning rate per target, and every run's cost to target.

Targets are set per task and seed, so that prompts and noise are paired:

    reference_kl        the baseline's final held-out reverse KL at the reference learning rate
    best_kl             the same at the learning rate with the lowest final KL (median over seeds)
    gap_90              10 % of the held-out reverse KL at step 0 (90 % of the gap is closed)
    reference_accuracy  the baseline's final accuracy at the reference learning rate

Final values are smoothed. The best learning rate for a target is the rate with which the baseline
reaches it in the smallest median seconds. A run that never reaches the target counts as ∞; ties go
to the lower final KL. Rates are ranked on the seeds that all rates have. The comparison uses the
same seeds, which favors the baseline.

The cost of every run, including the baseline, is the cost at its own first evaluation at the
target. A run identical to the baseline therefore gets a speed-up of 1×, even if the baseline
gained nothing in its last steps.
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
#: Seconds of a run that never reaches the target: more than any real run takes.
_SECONDS_IF_NEVER = 1e15

#: (task, seed) → target → value.
TargetValues = Mapping[Place, Mapping[str, float]]


@dataclass(frozen=True)
class Targets:
    """Targets of a grid and the cost of every run to reach them.

    Attributes:
        values: (task, seed) → target → value.
        best_rate: task → target → the baseline's best learning rate.
        lowest_rate: task → the learning rate with the baseline's lowest final KL.
        costs: (arm, place) → target → cost at the target; `None`: the run never reaches it.
    """

    values: TargetValues
    best_rate: Mapping[str, Mapping[str, float | None]]
    lowest_rate: Mapping[str, float | None]
    costs: Mapping[tuple[Arm, Place], Mapping[str, Cost | None]]


def find_targets(runs: Sequence[GridRun], roles: Roles) -> Targets:
    """Targets of a grid's runs, and the cost of every run to reach them."""
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
    """Targets set by a run of the reference arm; non-finite values set none."""
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
    """Learning rate with the smallest median cost over the seeds that all rates have; skips NaN."""
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
