"""Paired speed-ups of a grid: median and interval per task, arm, opponent, target and cost axis.

Opponents of an arm:

    baseline   at the reference rate, at its best rate for the target, and at the arm's own rate
    rivals     at the reference rate
    parent     of a variant, at the arm's own rate

Over all tasks, a seed counts once, with the geometric mean of its speed-ups over the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from effopd.compare.grid_run import AXES, Arm, Place
from effopd.compare.paired import median_with_interval, ratio
from effopd.compare.roles import Roles
from effopd.compare.targets import TARGETS, Targets
from effopd.compare.time_to_target import Cost

ALL = "all"
#: Placeholders: the baseline's best learning rate for a target, and the arm's own learning rate.
BEST, SAME = "best", "same"


@dataclass(frozen=True)
class Opponent:
    """Strategy that an arm is compared with; `rate` is a learning rate, `BEST` or `SAME`."""

    strategy: str
    rate: float | str


def opponents(arm: Arm, arms: Sequence[Arm], roles: Roles) -> list[Opponent]:
    """Opponents of an arm, without duplicates."""
    baseline, reference = roles.reference
    rivals = [Opponent(rival, reference) for rival in roles.rivals if (rival, reference) in arms]
    parent = roles.parent(arm, arms)
    variant = [Opponent(parent[0], SAME)] if parent else []
    everyone = [Opponent(baseline, rate) for rate in (reference, BEST, SAME)] + rivals + variant
    return list(dict.fromkeys(everyone))


def speedup_rows(arms: Sequence[Arm], tasks: Sequence[str], roles: Roles, targets: Targets) -> list[dict[str, Any]]:
    """One row per arm, opponent, target, axis and task with at least one pair."""
    return [
        {
            "task": task, "strategy": arm[0], "learning_rate": arm[1],
            "against": opponent.strategy, "against_learning_rate": opponent.rate,
            "target": target, "axis": axis, **median_with_interval(values).to_row(),
        }
        for arm in arms
        for opponent in opponents(arm, arms, roles)
        for target, axis in product(TARGETS, AXES)
        for task, values in _by_task(_ratios(arm, opponent, target, axis, targets), tasks)
    ]  # fmt: skip


def _ratios(arm: Arm, opponent: Opponent, target: str, axis: str, targets: Targets) -> dict[Place, float]:
    """Opponent's cost / the arm's cost, for every task and seed that both have."""
    ratios = {}
    for (other, place), costs in targets.costs.items():
        if other != arm:
            continue
        best = targets.best_rate[place[0]][target]
        rate = best if opponent.rate == BEST else arm[1] if opponent.rate == SAME else opponent.rate
        against = targets.costs.get(((opponent.strategy, rate), place))  # type: ignore[arg-type]
        if against is not None and target in costs and target in against:
            ratios[place] = ratio(_on(against[target], axis), _on(costs[target], axis))
    return ratios


def _on(cost: Cost | None, axis: str) -> float | None:
    return None if cost is None else getattr(cost, axis)


def _by_task(ratios: Mapping[Place, float], tasks: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    """(task, values over seeds), then (`ALL`, values) for several tasks; skips empty values."""
    for task in tasks:
        if values := [value for (where, _), value in ratios.items() if where == task]:
            yield task, values
    if len(tasks) > 1 and (values := _over_tasks(ratios, tasks)):
        yield ALL, values


def _over_tasks(ratios: Mapping[Place, float], tasks: Sequence[str]) -> list[float]:
    """Geometric mean over tasks, for each seed with a pair on every task.

    A 0 or ∞ on one task makes the mean 0 or ∞; both together make it NaN.
    """
    means = []
    for seed in sorted({seed for _, seed in ratios}):
        values = [value for (_, other), value in ratios.items() if other == seed]
        if len(values) == len(tasks):
            with np.errstate(divide="ignore", invalid="ignore"):
                means.append(float(np.exp(np.mean(np.log(values)))))
    return means
