"""Tables of docs/batch_size.md: small against large batches; `readme_results.py` writes them.

Nothing is run. Two comparisons:

- docs/batch_sizes/results.json: 8 to 32 prompts per batch of rollouts, with reuse
  (recipes/compare-batch-sizes.yaml), and docs/tail/results.json: the same seeds with 1024 held-out
  prompts (recipes/compare-tail.yaml).
- docs/results.json with 256 prompts per step against docs/ablation/results.json with 32: the same
  models, tasks, seeds and held-out prompts. The target is the final KL of plain OPD with the large
  batch at the reference learning rate. Speed-ups are over `line_search` with the large batch from
  the reference rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rivals import FEW_SHARES, Cost, Hindsight, costs, ends_table, heads, priced, run_cost, steps_table

from effopd.compare.cross_targets import across, runs_of
from effopd.report.compare_lookup import AXIS_NAMES, Lookup, factor, table, times

STRATEGIES = ("plain", "line_search")
#: Arm with reuse, and what precedes the number of prompts in the names of its plan.
REUSE, PROMPTS = "newton_search-schedule-free-3", "-prompts-"
#: Targets of the comparison with more held-out prompts.
TAIL_SHARES = (0.25, 0.1, 0.05, 0.025)


def reuse_blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of the comparison of batch sizes."""
    return {
        "reuse": reuse_table(results, priced),
        "reuse, sampled tokens": reuse_table(results, costs()["sampled tokens"]),
        "reuse, searches": searches_table(results),
        "reuse, steps": steps_table(results, FEW_SHARES),
    }


def tail_blocks(results: Mapping[str, Any], batch_sizes: Mapping[str, Any]) -> dict[str, str]:
    """Blocks on the last targets: the same arms and seeds with more and fewer held-out prompts.

    Args:
        results: docs/tail/results.json.
        batch_sizes: docs/batch_sizes/results.json.
    """
    made = {run_key(run) for run in results["runs"]}
    few = {**batch_sizes, "runs": [run for run in batch_sizes["runs"] if run_key(run) in made]}
    rows = []
    for grid in (results, few):
        prompts, known, look = grid["settings"]["base"]["eval_size"], Hindsight(grid, priced), Lookup(grid)
        for task in look.tasks:
            for arm in dict.fromkeys(name for name, _ in look.arms if name.startswith(REUSE)):
                cells = (known.ratios(task, arm, share) for share in TAIL_SHARES)
                rows.append([f"`{task.split(':')[1]}`", str(prompts), arm.removeprefix(REUSE + PROMPTS), *cells])
            rows.append([f"`{task.split(':')[1]}`", str(prompts), "fastest",
                         *(known.opponent(task, share) for share in TAIL_SHARES)])  # fmt: skip
    head = ["task", "held-out prompts", "prompts per batch", *heads(TAIL_SHARES)]
    return {
        "tail": table(head, rows),
        "tail, steps": steps_table(results, TAIL_SHARES),
        "tail, ends": ends_table(results),
    }


def run_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a run in grids of the same arms."""
    return run["task"], run["strategy"], run["learning_rate"], run["seed"]


def search_percent(curve: Mapping[str, Any]) -> list[float]:
    """Share of the net seconds in searches at every evaluation of a curve, in %."""
    pairs = zip(curve["search_seconds"], curve["seconds"], strict=True)
    return [100 * search / net if net else 0.0 for search, net in pairs]


def searches_table(results: Mapping[str, Any]) -> str:
    """Share of the look-ahead's net seconds in searches, to every target; all rates and seeds."""
    look, rows = Lookup(results), []
    for task in look.tasks:
        for arm in dict.fromkeys(name for name, _ in look.arms if name.startswith(REUSE)):
            runs = [run for name, rate in look.arms if name == arm for run in look.runs(task, (name, rate))]
            cells = []
            for share in FEW_SHARES:
                shares = [value for run in runs if math.isfinite(value := run_cost(run, share, search_percent))]
                cells.append(
                    f"{statistics.median(shares):.0f} ({min(shares):.0f}–{max(shares):.0f})" if shares else "–"
                )
            rows.append([f"`{task.split(':')[1]}`", arm.removeprefix(REUSE + PROMPTS), str(len(runs)), *cells])
    return table(["task", "prompts", "runs", *heads(FEW_SHARES)], rows)


def reuse_table(results: Mapping[str, Any], cost: Cost) -> str:
    """Cost of the fastest baseline of the same batch size and of any, over the look-ahead's."""
    look, baselines, rows = Lookup(results), results["settings"]["baselines"], []
    arms = dict.fromkeys(name for name, _ in look.arms if name.startswith(REUSE))
    sizes = {arm: arm.removeprefix(REUSE) for arm in arms}
    same = {arm: Hindsight(results, cost, [b for b in baselines if b.endswith(size)]) for arm, size in sizes.items()}
    any_size = Hindsight(results, cost)
    for task in look.tasks:
        name = f"`{task.split(':')[1]}`"
        for arm, size in sizes.items():
            for label, rivals in (("the same", same[arm]), ("any", any_size)):
                cells = (rivals.ratios(task, arm, share) for share in FEW_SHARES)
                rows.append([name, size.removeprefix(PROMPTS), label, *cells])
        rows.append([name, "", "fastest", *(any_size.opponent(task, share) for share in FEW_SHARES)])
    return table(["task", "prompts", "opponent's prompts", *heads(FEW_SHARES)], rows)


def compared(large: dict[str, Any], small: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `cross_targets.across` for small batches: plain OPD and `line_search`, all rates."""
    reference = large["settings"]["reference_learning_rate"]
    home, other = runs_of(large), runs_of(small)
    arms = sorted(
        {run.arm for run in other if run.strategy in STRATEGIES}, key=lambda arm: (arm[0] != "plain", arm[1])
    )
    rows = across(home, (large["settings"]["baseline"], reference), ("line_search", reference), other, arms)
    return sorted(rows, key=lambda row: arms.index((row["strategy"], row["learning_rate"])))


def settings_table(large: dict[str, Any], small: dict[str, Any]) -> str:
    """Settings that differ between the two grids."""
    grids = [grid["settings"]["base"] for grid in (large, small)]
    seeds = [len({run["seed"] for run in grid["runs"]}) for grid in (large, small)]
    rows = {
        "optimizer steps": [grid["max_steps"] for grid in grids],
        "steps between evaluations": [grid["eval_steps"] for grid in grids],
        "seeds": seeds,
    }
    head = ["", *(f"{grid['per_device_train_batch_size']} prompts per step" for grid in grids)]
    return table(head, [[label, *map(str, values)] for label, values in rows.items()])


def speed_table(large: dict[str, Any], small: dict[str, Any]) -> str:
    """Speed-ups over `line_search` with large batches; one row per task, strategy and rate."""
    rows, reference = compared(large, small), large["settings"]["reference_learning_rate"]
    arms = dict.fromkeys((row["task"], row["strategy"], row["learning_rate"]) for row in rows)
    axes = {axis: name for axis, name in AXIS_NAMES.items() if axis != "steps"}
    lines = []
    for task in dict.fromkeys(arm[0] for arm in arms):
        for arm in (arm for arm in arms if arm[0] == task):
            by_axis = {row["axis"]: row for row in rows if (row["task"], row["strategy"], row["learning_rate"]) == arm}
            reached = f"{by_axis['steps']['reached']} of {by_axis['steps']['n']}"
            speeds = [times(by_axis[axis]) for axis in axes]
            lines.append([task, f"`{arm[1]}`", factor(arm[2], reference), reached, *speeds])
    return table(["task", "strategy", "learning rate", "reached", *axes.values()], lines)
