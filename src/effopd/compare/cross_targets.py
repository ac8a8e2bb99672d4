"""Times to targets that a grid's own analysis does not set: the baseline's end at each learning rate, and another grid's target.

`bench.results` asks every run for one target a task and seed, the baseline's end at the reference learning rate. Two other
questions are answered here, from the runs of results.json:

    own_rate     how much sooner than the baseline at the same learning rate a run gets to where that baseline ends
    across       how much sooner a run of one grid gets to the reference target of another than that grid's own run

Speed-ups are paired by seed; costs are those of the first smoothed evaluation at the target, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effopd.compare.paired import median_with_interval, ratio
from effopd.compare.results import AXES, Run, from_row
from effopd.compare.time_to_target import Cost, final_target
from effopd.errors import ConfigError

Arm = tuple[str, float]
#: Relative difference of the KL at step 0 up to which two runs count as evaluated on the same prompts.
_SAME_START = 1e-4


def runs_of(results: Mapping[str, Any]) -> list[Run]:
    """The runs of a results.json."""
    return [from_row(row) for row in results["runs"]]


def own_rate(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """Speed-up over the baseline at the arm's own learning rate, to the baseline's final smoothed KL at that rate.

    Returns:
        a row a task, arm and axis (`AXES`), arms without a baseline at their rate left out: `task`, `strategy`,
        `learning_rate`, `axis`, `reached` (runs that arrive) and the fields of `paired.Estimate`.
    """
    ends = {(r.task, r.seed, r.learning_rate): r for r in runs if r.strategy == baseline}
    rows = []
    for task, arm in _arms(runs):
        own = [r for r in runs if r.task == task and r.arm == arm and (r.task, r.seed, arm[1]) in ends]
        pairs = []
        for run in own:
            plain = ends[run.task, run.seed, arm[1]]
            target = final_target(plain.rows)
            pairs.append((plain.cost(target, "eval_kl", False), run.cost(target, "eval_kl", False)))
        rows += _rows(task, arm, pairs)
    return rows


def across(
    home: Sequence[Run], reference: Arm, rival: Arm, other: Sequence[Run], arms: Iterable[Arm] | None = None
) -> list[dict[str, Any]]:
    """Speed-up of runs of another grid over the arm `rival` of `home`, to the final smoothed KL of `home`'s arm `reference`.

    Args:
        arms: arms of `other`; all of them by default.

    Returns:
        rows as of `own_rate`, over the seeds that both grids have; `last_steps` is where the shortest of the runs ended.

    Raises:
        ConfigError: runs of the same task and seed do not start at the same held-out KL, so that their evaluations (prompts
            or sampling) differ.
    """
    at_home = {(r.arm, r.task, r.seed): r for r in home}
    kept = None if arms is None else list(arms)
    rows = []
    for task, arm in _arms(other):
        if kept is not None and arm not in kept:
            continue
        pairs, last = [], []
        for run in other:
            plain, own = (at_home.get((which, run.task, run.seed)) for which in (reference, rival))
            if run.task != task or run.arm != arm or plain is None or own is None:
                continue
            _same_start(plain, run)
            target = final_target(plain.rows)
            pairs.append((own.cost(target, "eval_kl", False), run.cost(target, "eval_kl", False)))
            last.append(run.rows[-1]["step"])
        rows += [row | {"last_steps": min(last)} for row in _rows(task, arm, pairs)]
    return rows


def _arms(runs: Iterable[Run]) -> list[tuple[str, Arm]]:
    return list(dict.fromkeys((run.task, run.arm) for run in runs))


def _same_start(first: Run, second: Run) -> None:
    a, b = (run.rows[0]["eval_kl"] for run in (first, second))
    if abs(a - b) > _SAME_START * abs(a):
        raise ConfigError(
            f"{first.task}, seed {first.seed}: the two grids start at a held-out KL of {a:.5f} and {b:.5f}; expected the same: "
            "compare grids with the same student, teacher, eval_size and seeds."
        )


def _rows(task: str, arm: Arm, pairs: Sequence[tuple[Cost | None, Cost | None]]) -> list[dict[str, Any]]:
    """A row an axis, of (cost of what is compared with, own cost) by seed."""
    if not pairs:
        return []
    return [
        {"task": task, "strategy": arm[0], "learning_rate": arm[1], "axis": axis,
         "reached": sum(own is not None for _, own in pairs)}
        | median_with_interval(
            [ratio(*(None if cost is None else getattr(cost, axis) for cost in pair)) for pair in pairs]
        ).to_row()
        for axis in AXES
    ]  # fmt: skip
