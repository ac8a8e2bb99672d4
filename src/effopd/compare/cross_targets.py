"""Speed-ups to targets outside a grid's analysis: the baseline's own rate, another grid's target.

    own_rate   speed-up over the baseline at the arm's own learning rate;
               target: the baseline's final KL at that rate
    across     speed-up of another grid's runs over an arm of this grid;
               target: the final KL of this grid's reference arm

Both use the runs of results.json. Speed-ups are paired by seed. Costs are those at the first
smoothed evaluation at the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effopd.compare.grid_run import AXES, Arm, GridRun, from_row
from effopd.compare.paired import median_with_interval, ratio
from effopd.compare.time_to_target import Cost, final_target
from effopd.errors import ConfigError

#: Largest relative difference of the KL at step 0 between runs evaluated on the same prompts.
_SAME_START = 1e-4
#: Costs of the opponent and of the run; `None`: target never reached.
CostPair = tuple[Cost | None, Cost | None]


def runs_of(results: Mapping[str, Any]) -> list[GridRun]:
    """The runs of a results.json."""
    return [from_row(row) for row in results["runs"]]


def own_rate(runs: Sequence[GridRun], baseline: str) -> list[dict[str, Any]]:
    """Speed-up over the baseline at the arm's own learning rate.

    The target is the baseline's final smoothed KL at that rate.

    Returns:
        One row per task, arm and axis (`AXES`): `task`, `strategy`, `learning_rate`, `axis`,
        `reached` (number of runs that reach the target) and the fields of `paired.SeedMedian`.
        Runs without a baseline at their rate, or whose baseline diverged, are left out.
    """
    baselines = {(run.task, run.seed, run.learning_rate): run for run in runs if run.strategy == baseline}
    rows = []
    for task, arm in _arms(runs):
        pairs: list[CostPair] = []
        for run in runs:
            against = baselines.get((run.task, run.seed, run.learning_rate))
            if run.task == task and run.arm == arm and against is not None:
                pairs += _costs(against, run, final_target(against.evaluations))
        rows += _rows(task, arm, pairs)
    return rows


def across(
    home: Sequence[GridRun],
    reference: Arm,
    opponent: Arm,
    other: Sequence[GridRun],
    arms: Iterable[Arm] | None = None,
) -> list[dict[str, Any]]:
    """Speed-up of the runs of grid `other` over an arm of grid `home`.

    Args:
        home: runs of the grid that sets the target.
        reference: arm of `home` whose final smoothed KL is the target.
        opponent: arm of `home` that speed-ups are measured against.
        other: runs of the other grid.
        arms: arms of `other`; `None`: all.

    Returns:
        Rows as in `own_rate`, over the seeds present in both grids at which the reference has not
        diverged. `last_steps` is the last step of the shortest run.

    Raises:
        ConfigError: runs of the same task and seed start at different held-out KLs, so their
            evaluations (prompts or sampling) differ.
    """
    at_home = {(run.arm, run.task, run.seed): run for run in home}
    wanted = None if arms is None else list(arms)
    rows = []
    for task, arm in _arms(other):
        if wanted is not None and arm not in wanted:
            continue
        pairs: list[CostPair] = []
        last = []
        for run in other:
            plain, against = (at_home.get((which, run.task, run.seed)) for which in (reference, opponent))
            if run.task != task or run.arm != arm or plain is None or against is None:
                continue
            check_same_start(plain, run)
            pairs += _costs(against, run, final_target(plain.evaluations))
            last.append(run.evaluations[-1].step)
        rows += [row | {"last_steps": min(last)} for row in _rows(task, arm, pairs)]
    return rows


def _arms(runs: Iterable[GridRun]) -> list[tuple[str, Arm]]:
    return list(dict.fromkeys((run.task, run.arm) for run in runs))


def _costs(against: GridRun, run: GridRun, target: float) -> list[CostPair]:
    """Costs of both runs at a target KL; empty if it is not finite, that of a diverged run."""
    return [(against.cost(target, "kl", False), run.cost(target, "kl", False))] if math.isfinite(target) else []


def check_same_start(first: GridRun, second: GridRun) -> None:
    """Refuse runs of the same task and seed that start at different held-out KLs.

    Raises:
        ConfigError: their evaluations (prompts or sampling) differ.
    """
    a, b = (run.evaluations[0].kl for run in (first, second))
    assert a is not None and b is not None
    if abs(a - b) > _SAME_START * abs(a):
        raise ConfigError(
            f"{first.task}, seed {first.seed}: the two grids start at a held-out KL of "
            f"{a:.5f} and {b:.5f}; expected the same. "
            "Compare grids with the same student, teacher, eval_size and seeds."
        )


def _rows(task: str, arm: Arm, pairs: Sequence[CostPair]) -> list[dict[str, Any]]:
    """One row per axis."""
    if not pairs:
        return []
    reached = sum(cost is not None for _, cost in pairs)
    return [
        {"task": task, "strategy": arm[0], "learning_rate": arm[1], "axis": axis, "reached": reached}
        | median_with_interval(
            [ratio(*(None if cost is None else getattr(cost, axis) for cost in pair)) for pair in pairs]
        ).to_row()
        for axis in AXES
    ]
