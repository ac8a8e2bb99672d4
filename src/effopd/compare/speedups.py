"""Paired speed-ups of a grid, as tidy rows: task, arm, opponent, target, axis, and a median with
its interval.

Every arm is compared with the baseline at the reference learning rate, at the baseline's best
learning rate for the target and at the arm's own, with the rivals at the reference learning rate,
and with what it is a variant of at its own. Over all tasks a seed counts once, with the geometric
mean of its speed-ups on every task.
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
#: Stand for the baseline's best learning rate for a target, and for the learning rate of the arm
#: itself.
BEST, SAME = "best", "same"


@dataclass(frozen=True)
class Opponent:
    """Whom an arm is compared with: a strategy at a learning rate, at its `BEST` or at the arm's
    own (`SAME`).
    """

    strategy: str
    rate: float | str


def opponents(arm: Arm, arms: Sequence[Arm], roles: Roles) -> list[Opponent]:
    """Whom an arm is compared with, each once."""
    baseline, reference = roles.reference
    rivals = [Opponent(rival, reference) for rival in roles.rivals if (rival, reference) in arms]
    parent = roles.parent(arm, arms)
    variant = [Opponent(parent[0], SAME)] if parent else []
    everyone = [Opponent(baseline, rate) for rate in (reference, BEST, SAME)] + rivals + variant
    return list(dict.fromkeys(everyone))


def speedup_rows(arms: Sequence[Arm], tasks: Sequence[str], roles: Roles, targets: Targets) -> list[dict[str, Any]]:
    """One row per arm, opponent, target, axis and task, where there is a pair."""
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
    """Opponent's cost / the arm's own, of every task and seed that both have."""
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
    """(task, values over seeds), then (`ALL`, values) where there are several tasks; without empty
    ones.
    """
    for task in tasks:
        if values := [value for (where, _), value in ratios.items() if where == task]:
            yield task, values
    if len(tasks) > 1 and (values := _over_tasks(ratios, tasks)):
        yield ALL, values


def _over_tasks(ratios: Mapping[Place, float], tasks: Sequence[str]) -> list[float]:
    """The geometric mean over tasks of each seed that has a pair on every one; 0 or ∞ on one task
    is that of all, both NaN.
    """
    means = []
    for seed in sorted({seed for _, seed in ratios}):
        values = [value for (_, other), value in ratios.items() if other == seed]
        if len(values) == len(tasks):
            with np.errstate(divide="ignore", invalid="ignore"):
                means.append(float(np.exp(np.mean(np.log(values)))))
    return means
