"""Finished runs → results.json: time-to-target, paired speed-ups, areas, final quality, shares of cost.

Targets, for each task and seed (so that prompts and noise are paired):

    reference_kl        the baseline's final smoothed held-out reverse KL at the reference learning rate
    best_kl             the same at the learning rate where the baseline ends lowest (median over seeds)
    gap_90              a tenth of the held-out reverse KL at step 0: 90 % of the way to the teacher
    reference_accuracy  the baseline's final smoothed accuracy at the reference learning rate

The best learning rate for a target is the one at which the baseline gets there in the smallest median seconds (a run that
never does counts as ∞; ties go to the lower final KL). Rates are ranked on the seeds that all of them have, the very seeds
they are judged on, which favours the baseline. Every run's cost is that of its own first evaluation at the target, the
baseline's too: a run like the baseline is 1×, not faster because the baseline's last steps brought nothing.

Over all tasks a seed counts once, with the geometric mean of its speed-ups on every task.

A strategy named like another one of the grid with `-something` after it is a variant of it, and is also compared with that
one at its own learning rate: `line_search-no-steering` with `line_search`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effopd.common.files import read_rows
from effopd.common.versions import versions
from effopd.compare.paired import median_with_interval, ratio
from effopd.compare.time_to_target import WINDOW, Cost, final_target, first_reach, smooth
from effopd.errors import CheckpointError
from effopd.runs.records import EVALS, SEARCHES

AXES = ("steps", "seconds", "generated_tokens", "forward_tokens")
#: Target → (metric, higher is better).
TARGETS = {
    "reference_kl": ("eval_kl", False),
    "best_kl": ("eval_kl", False),
    "gap_90": ("eval_kl", False),
    "reference_accuracy": ("eval_accuracy", True),
}
#: The strategy that others are compared with besides the baseline.
RIVAL = "effopd"
#: Columns of a run's curve in results.json and the fields of evals.jsonl they come from.
CURVE = {
    "step": "step",
    "kl": "eval_kl",
    "kl_se": "eval_kl_se",
    "accuracy": "eval_accuracy",
    "seconds": "cost/net_seconds",
    "generated_tokens": "cost/net_generated_tokens",
    "forward_tokens": "cost/net_forward_tokens",
    "search_seconds": "cost/search_seconds",
}
#: Columns without which there is still something to compare.
_OPTIONAL = ("kl_se", "search_seconds")
ALL = "all"
#: Stand for the baseline's best learning rate for a target, and for the learning rate of the arm itself.
BEST, SAME = "best", "same"


@dataclass(frozen=True)
class Run:
    """A finished run: its place in the grid, its evaluations (rows of evals.jsonl, step 0 first) and its searches."""

    task: str
    strategy: str
    learning_rate: float
    seed: int
    rows: tuple[Mapping[str, Any], ...]
    searches: tuple[Mapping[str, Any], ...] = ()
    #: Which state of the code made it (`versions.code`).
    code: str | None = None
    #: The merges that brought its seconds to this machine's, oldest first: indices into `settings.elsewhere`.
    merges: tuple[int, ...] = ()

    @property
    def arm(self) -> tuple[str, float]:
        """(strategy, learning rate)."""
        return self.strategy, self.learning_rate

    @property
    def place(self) -> tuple[str, int]:
        """(task, seed): what is paired."""
        return self.task, self.seed

    def diverged(self) -> Run:
        """The same run, ended by a loss that was not finite: worse than any number from its last evaluation on."""
        end = dict(self.rows[-1]) | {"eval_kl": math.inf, "eval_accuracy": -math.inf}
        return dataclasses.replace(self, rows=(*self.rows, *[end] * WINDOW))

    def cost(self, target: float, metric: str, higher_is_better: bool) -> Cost | None:
        """Cost at the first evaluation at the target."""
        return first_reach(self.rows, target, metric, higher_is_better=higher_is_better)


def read_run(path: Path, *, task: str, strategy: str, learning_rate: float, seed: int, code: str | None = None) -> Run:
    """A run from its folder.

    Raises:
        CheckpointError: it holds no evaluations, or they lack what the comparison divides.
    """
    rows = tuple(read_rows(path / EVALS))
    missing = {key for row in rows for name, key in CURVE.items() if name not in _OPTIONAL and key not in row}
    if not rows or missing:
        raise CheckpointError(
            f"{path / EVALS} should hold evaluations with KL, accuracy and costs, but "
            + (f"lacks {', '.join(sorted(missing))}" if rows else "has no row")
            + ". Train with eval_strategy: steps on a task of this package, or leave the run out."
        )
    return Run(task, strategy, learning_rate, seed, rows, tuple(read_rows(path / SEARCHES)), code)


def to_row(run: Run) -> dict[str, Any]:
    """A run as JSON, its curves in 5 significant digits; NaN and ∞ (a run that diverged) become `None`."""
    return {
        "task": run.task,
        "strategy": run.strategy,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "code": run.code,
        "merges": list(run.merges),
        "curve": {name: [_short(row.get(key, 0.0)) for row in run.rows] for name, key in CURVE.items()},
        "accepted": [[row["step"], row["accepted_scale"]] for row in run.searches if row["accepted_scale"]],
        "searches": sum(len(row["trials"]) > 1 for row in run.searches),
        "memory_bytes": max((row["memory_bytes"] for row in run.searches if row.get("memory_bytes")), default=None),
        "fit": next((row["fit"] for row in reversed(run.searches) if "fit" in row), None),
    }


def from_row(row: Mapping[str, Any]) -> Run:
    """The inverse of `to_row`, up to rounding; what was not finite comes back as worse than any number."""
    columns = [
        [(-math.inf if name == "accuracy" else math.inf) if value is None else value for value in row["curve"][name]]
        for name in CURVE
    ]
    rows = [dict(zip(CURVE.values(), values, strict=True)) for values in zip(*columns, strict=True)]
    searches: list[dict[str, Any]] = [
        {"step": step, "accepted_scale": scale, "trials": (0, 1)} for step, scale in row["accepted"]
    ]
    searches += [{"step": -1, "accepted_scale": 0.0, "trials": (0, 1)}] * (row["searches"] - len(searches))
    if row.get("fit"):
        searches.append({"step": -1, "accepted_scale": 0.0, "trials": (), "fit": row["fit"]})
    if row["memory_bytes"]:
        searches.append({"step": -1, "accepted_scale": 0.0, "trials": (), "memory_bytes": row["memory_bytes"]})
    return Run(
        row["task"], row["strategy"], row["learning_rate"], row["seed"], tuple(rows), tuple(searches), row.get("code"),
        tuple(row.get("merges", ())),
    )  # fmt: skip


def _short(value: float) -> float | int | None:
    return value if isinstance(value, int) else _finite(float(f"{value:.5g}"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def analyse(runs: Sequence[Run], *, baseline: str, reference_learning_rate: float) -> dict[str, Any]:
    """Everything results.json holds. Works on unfinished grids too: pairs that exist are used, and counted.

    Curves are rounded first, so that the same comes out of the file that is written.
    """
    runs = [from_row(to_row(run)) for run in runs]
    reference = (baseline, reference_learning_rate)
    tasks = list(dict.fromkeys(run.task for run in runs))
    targets = _targets(runs, reference, "reference")
    lowest = {task: _ranked(runs, task, baseline, lambda run: final_target(run.rows)) for task in tasks}
    for task, rate in lowest.items():
        for place, values in _targets(runs, (baseline, rate), "best", task).items():
            if place in targets:
                targets[place].update(values)
    best = {task: {name: _fastest_rate(runs, task, baseline, targets, name) for name in TARGETS} for task in tasks}
    budgets = {run.place: run.rows[-1] for run in runs if run.arm == reference}
    found = {(run.arm, run.place): run for run in runs}
    costs = {
        key: {name: run.cost(value, *TARGETS[name]) for name, value in targets.get(run.place, {}).items()}
        for key, run in found.items()
    }
    arms = list(dict.fromkeys(run.arm for run in runs))
    return {
        "versions": versions(),
        "settings": {
            "baseline": baseline,
            "reference_learning_rate": reference_learning_rate,
            "smoothing_window": WINDOW,
        },
        "best_learning_rate": best,
        "lowest_learning_rate": lowest,
        "swept": {
            task: sorted({run.learning_rate for run in runs if run.task == task and run.strategy == baseline})
            for task in tasks
        },
        "runs": [
            _run_row(run, targets.get(run.place, {}), costs[run.arm, run.place], budgets.get(run.place))
            for run in runs
        ],
        "speedups": _speedups(arms, tasks, reference, best, costs),
        "quality": _quality(arms, tasks, found, reference, lowest, budgets, costs),
    }


def _targets(
    runs: Sequence[Run], arm: tuple[str, float | None], kind: str, task: str | None = None
) -> dict[tuple[str, int], dict[str, float]]:
    """Final smoothed values of an arm, by (task, seed); a run that diverged sets none."""
    targets: dict[tuple[str, int], dict[str, float]] = {}
    for run in runs:
        if run.arm == arm and task in (None, run.task):
            values = {f"{kind}_kl": final_target(run.rows)}
            if kind == "reference":
                values["reference_accuracy"] = final_target(run.rows, "eval_accuracy")
                values["gap_90"] = 0.1 * run.rows[0]["eval_kl"]
            targets[run.place] = {name: value for name, value in values.items() if math.isfinite(value)}
    return targets


def _ranked(runs: Sequence[Run], task: str, baseline: str, badness: Callable[[Run], float]) -> float | None:
    """The baseline's learning rate of the smallest median badness, over the seeds that all its rates have."""
    own: dict[float, list] = {run.arm[1]: [] for run in runs if run.task == task and run.strategy == baseline}
    seeds = (
        set.intersection(*({r.seed for r in runs if r.task == task and r.arm == (baseline, rate)} for rate in own))
        if own
        else set()
    )
    ranked = []
    for rate in own:
        values = [badness(r) for r in runs if r.task == task and r.arm == (baseline, rate) and r.seed in seeds]
        values = [value for value in values if not math.isnan(value)]
        if values:
            ranked.append((statistics.median(values), rate))
    return min(ranked)[1] if ranked else None


def _fastest_rate(runs: Sequence[Run], task: str, baseline: str, targets: Mapping, target: str) -> float | None:
    """The baseline's best learning rate for a target."""

    def seconds(run: Run) -> float:
        if target not in targets.get(run.place, {}):
            return math.nan
        cost = run.cost(targets[run.place][target], *TARGETS[target])
        return (
            cost.seconds if cost else _NEVER * (1 + min(final_target(run.rows), 1e3))
        )  # ties go to the lower final KL

    return _ranked(runs, task, baseline, seconds)


#: More seconds than any run takes.
_NEVER = 1e15


def _run_row(run: Run, targets: Mapping[str, float], costs: Mapping[str, Cost | None], budget: Any) -> dict[str, Any]:
    last = run.rows[-1]
    row = to_row(run) | {
        "final_kl": _finite(final_target(run.rows)),
        "final_accuracy": _finite(final_target(run.rows, "eval_accuracy")),
        "net_seconds": last["cost/net_seconds"],
        "generated_tokens": last["cost/net_generated_tokens"],
        "forward_tokens": last["cost/net_forward_tokens"],
        "search_share": _search_share(run),
    }
    for axis, key in (("steps", "step"), ("seconds", "cost/net_seconds")):
        row[f"auc_{axis}"] = _finite(area(run, key, budget[key])) if budget else None
    row["targets"] = {
        name: {"value": value, "reached": costs[name] is not None}
        | (asdict(costs[name]) if costs[name] else dict.fromkeys(AXES, None))  # type: ignore[arg-type]
        | {"above_again": _above_again(run, name, value, costs[name])}
        for name, value in targets.items()
    }
    return row


def _search_share(run: Run, until: Cost | None = None) -> float:
    """Share of search in net seconds, of the whole run or until a cost was reached."""
    row = next((row for row in run.rows if until is not None and row["step"] == until.steps), run.rows[-1])
    return row["cost/search_seconds"] / row["cost/net_seconds"] if row["cost/net_seconds"] else 0.0


def _above_again(run: Run, target: str, value: float, cost: Cost | None) -> float | None:
    """Share of the evaluations after the first at the target that are not at it any more (smoothed)."""
    if cost is None:
        return None
    metric, higher = TARGETS[target]
    sign = -1.0 if higher else 1.0
    later = [
        sign * smoothed > sign * value
        for row, smoothed in zip(run.rows, smooth([row[metric] for row in run.rows]), strict=True)
        if row["step"] > cost.steps
    ]
    return sum(later) / len(later) if later else 0.0


def area(run: Run, axis: str, budget: float) -> float:
    """Mean of smoothed KL / KL at step 0 over [0, budget] of a cost axis (trapezoid; the last value is held)."""
    x = np.array([row[axis] for row in run.rows], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # a run that diverged at once
        y = np.array(smooth([row["eval_kl"] for row in run.rows])) / np.float64(run.rows[0]["eval_kl"])
    inside = x < budget
    x_in = np.append(x[inside], budget)
    y_in = np.append(y[inside], np.interp(budget, x, y))
    return float(np.trapezoid(y_in, x_in) / budget)


def whole_of(arm: tuple[str, float], arms: Sequence[tuple[str, float]], baseline: str) -> tuple[str, float] | None:
    """The arm that `arm` is a variant of: the longest other name that its own begins with, at the same learning rate.

    Example:
        >>> whole_of(("effopd-strict", 0.1), [("effopd", 0.1), ("effopd", 0.3), ("effopd-strict", 0.1)], "vanilla")
        ('effopd', 0.1)
    """
    names = [name for name, rate in arms if rate == arm[1] and name != baseline and arm[0].startswith(f"{name}-")]
    return (max(names, key=len), arm[1]) if names else None


def _speedups(arms, tasks, reference, best, costs) -> list[dict[str, Any]]:
    """Each arm against the baseline at the reference, at its best and at the same learning rate, against the rival at
    the reference, and against what it is a variant of, by task and over all tasks (for seeds with a pair in each)."""
    rows = []
    rival = (RIVAL, reference[1])
    for arm in arms:
        rivals = [(reference[0], reference[1]), (reference[0], BEST), (reference[0], SAME)]
        rivals += [rival] * (rival in arms and rival != reference)
        whole = whole_of(arm, arms, reference[0])
        rivals += [(whole[0], SAME)] if whole else []
        for against, rate in rivals:
            for target in TARGETS:
                for axis in AXES:
                    pairs = []
                    for (other, (task, seed)), own in costs.items():
                        their = {BEST: best[task][target], SAME: arm[1]}.get(rate, rate)
                        base = costs.get(((against, their), (task, seed)))
                        if other == arm and base is not None and target in own and target in base:
                            pairs.append((task, seed, ratio(_on(base[target], axis), _on(own[target], axis))))
                    for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
                        values = _over_tasks(pairs, tasks) if task == ALL else [v for t, _, v in pairs if t == task]
                        if values:
                            rows.append(
                                {
                                    "task": task,
                                    "strategy": arm[0],
                                    "learning_rate": arm[1],
                                    "against": against,
                                    "against_learning_rate": rate,
                                    "target": target,
                                    "axis": axis,
                                    **median_with_interval(values).to_row(),
                                }
                            )
    return rows


def _over_tasks(pairs: Sequence[tuple[str, int, float]], tasks: Sequence[str]) -> list[float]:
    """The geometric mean over tasks of each seed that has a pair on every task; 0 or ∞ on one task is that of all, both NaN."""
    found = []
    for seed in sorted({seed for _, seed, _ in pairs}):
        values = [value for _, other, value in pairs if other == seed]
        if len(values) == len(tasks):
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(float(np.exp(np.mean(np.log(values)))))
    return found


def _on(cost: Cost | None, axis: str) -> float | None:
    return None if cost is None else getattr(cost, axis)


def _quality(arms, tasks, found, reference, lowest, budgets, costs) -> list[dict[str, Any]]:
    """Medians over seeds: final values; their paired differences to the baseline at the reference, at the same learning rate
    and at the one where it ends lowest, and to what it is a variant of; areas; search share."""
    rows = []
    for task in tasks:
        for arm in arms:
            own = [run for (other, place), run in found.items() if other == arm and place[0] == task]
            paired = [run for run in own if (reference, run.place) in found]
            values: dict[str, list[float]] = {
                "final_kl": [final_target(run.rows) for run in own],
                "final_accuracy": [final_target(run.rows, "eval_accuracy") for run in own],
                "auc_steps": [area(run, "step", budgets[run.place]["step"]) for run in paired],
                "auc_seconds": [
                    area(run, "cost/net_seconds", budgets[run.place]["cost/net_seconds"]) for run in paired
                ],
                "search_share": [_search_share(run) for run in own],
                "search_share_to_target": [
                    _search_share(run, cost) for run in own if (cost := costs[arm, run.place].get("reference_kl"))
                ],
            }
            rivals = {"": reference, "_same": (reference[0], arm[1]), "_lowest": (reference[0], lowest[task])}
            for name, rival in (rivals | {"_whole": whole_of(arm, arms, reference[0])}).items():
                others = [(run, found.get((rival, run.place))) for run in own]
                for measure, metric in (("kl", "eval_kl"), ("accuracy", "eval_accuracy")):
                    values[f"{measure}_difference{name}"] = [
                        final_target(run.rows, metric) - final_target(other.rows, metric)
                        for run, other in others
                        if other
                    ]
            for name, numbers in values.items():
                if numbers:
                    estimate = median_with_interval(numbers, zero_is_never=False)
                    rows.append({"task": task, "strategy": arm[0], "learning_rate": arm[1], "measure": name,
                                 **{k: v for k, v in estimate.to_row().items() if k in ("median", "low", "high", "n")}})  # fmt: skip
    return rows
