"""Quality of a grid's runs: final values, paired differences, areas under curves, search shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effopd.compare.grid_run import Arm, GridRun, Place
from effopd.compare.paired import median_with_interval
from effopd.compare.roles import Roles
from effopd.compare.targets import Targets
from effopd.compare.time_to_target import Cost, final_target, smoothed

ByArm = Mapping[tuple[Arm, Place], GridRun]


def quality_rows(
    arms: Sequence[Arm], tasks: Sequence[str], runs: ByArm, roles: Roles, targets: Targets
) -> list[dict[str, Any]]:
    """One row per task, arm and measure with a value: median over seeds and its interval.

    Measures are final values, areas over the baseline's budget, search shares, and differences of
    final values paired by seed. The suffix of a difference names the run it is taken against:

        (none)    baseline at the reference learning rate
        _same     baseline at the arm's own learning rate
        _lowest   baseline at the learning rate with its lowest final KL
        _parent   parent strategy of a variant, at the arm's own learning rate
    """
    rows = []
    for task in tasks:
        for arm in arms:
            of_arm = [run for (other, place), run in runs.items() if other == arm and place[0] == task]
            others = {
                "": roles.reference,
                "_same": (roles.baseline, arm[1]),
                "_lowest": (roles.baseline, targets.lowest_rate[task]),
                "_parent": roles.parent(arm, arms),
            }
            values = _values(of_arm, runs, roles.reference, targets)
            for suffix, other in others.items():
                pairs = [(run, runs.get((other, run.place))) for run in of_arm]  # type: ignore[arg-type]
                values |= _differences(suffix, [(run, against) for run, against in pairs if against is not None])
            rows += [
                {"task": task, "strategy": arm[0], "learning_rate": arm[1], "measure": measure, **_median(numbers)}
                for measure, numbers in values.items()
                if numbers
            ]
    return rows


def _median(numbers: Sequence[float]) -> dict[str, Any]:
    row = median_with_interval(numbers, zero_is_never=False).to_row()
    return {name: row[name] for name in ("median", "low", "high", "n")}


def _values(of_arm: Sequence[GridRun], runs: ByArm, reference: Arm, targets: Targets) -> dict[str, list[float]]:
    """Final values, areas over the budget of the paired reference run, and search shares."""
    budgets = [(run, Cost.of(runs[reference, run.place].evaluations[-1]))
               for run in of_arm if (reference, run.place) in runs]  # fmt: skip
    reached = [(run, targets.costs[run.arm, run.place].get("reference_kl")) for run in of_arm]
    return {
        "final_kl": [final_target(run.evaluations) for run in of_arm],
        "final_accuracy": [final_target(run.evaluations, "accuracy") for run in of_arm],
        "auc_steps": [area(run, "steps", budget.steps) for run, budget in budgets],
        "auc_seconds": [area(run, "seconds", budget.seconds) for run, budget in budgets],
        "search_share": [run.search_share() for run in of_arm],
        "search_share_to_target": [run.search_share(cost) for run, cost in reached if cost],
    }


def _differences(suffix: str, pairs: Sequence[tuple[GridRun, GridRun]]) -> dict[str, list[float]]:
    """Final value minus that of the other run, by metric."""
    return {
        f"{metric}_difference{suffix}": [
            final_target(run.evaluations, metric) - final_target(other.evaluations, metric) for run, other in pairs
        ]
        for metric in ("kl", "accuracy")
    }


def area(run: GridRun, axis: str, budget: float) -> float:
    """Mean of smoothed KL / KL at step 0 over [0, budget] of a cost axis, by the trapezoid rule.

    Costs before step 1, such as those of collecting rollouts, count at the KL of step 0. The last
    value is held if the run ends before the budget. The area of a run that diverges within the
    budget is ∞; over a budget of 0 it is NaN.

    Args:
        axis: `steps` or `seconds`.
    """
    x = np.array([e.step if axis == "steps" else e.costs.net_seconds for e in run.evaluations], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # a run that diverged before its first evaluation
        y = np.array(smoothed(run.evaluations)) / np.float64(run.evaluations[0].kl)
    if not np.isfinite(y[x <= budget]).all():
        return float("inf")
    if budget == 0:
        return float("nan")
    x, y = np.insert(x, 0, 0.0), np.insert(y, 0, y[0])
    inside = x < budget
    x_in = np.append(x[inside], budget)
    y_in = np.append(y[inside], np.interp(budget, x, y))
    return float(np.trapezoid(y_in, x_in) / budget)
