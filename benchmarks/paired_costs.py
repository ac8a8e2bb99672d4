"""Priced cost of one arm over that of another on the same seeds, from results.json of two grids.

    python benchmarks/paired_costs.py BEFORE/results.json AFTER/results.json --arm newton_search
    python benchmarks/paired_costs.py A/results.json A/results.json --arm topd --against plain

The cost to a target is interpolated, in the logarithm of the KL, up to the first evaluation at or
below it. Each cell: geometric mean over the seeds of (cost of `--against` in BEFORE) /
(cost of `--arm` in AFTER), its standard error in units of the logarithm, and in how many seeds each
arrives. Last column: KL of `--arm` over that of `--against` in the second half of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rivals import FEW_SHARES, heads, priced

from effopd.report.compare_lookup import table


def interpolated(curve: Mapping[str, Any], share: float) -> float:
    """Priced cost at which the KL of a curve first falls to `share` of its start; ∞: never."""
    kl, costs, target = curve["kl"], priced(curve), share * curve["kl"][0]
    for (above, below), (before, after) in zip(pairwise(kl), pairwise(costs), strict=True):
        if below <= target:
            part = math.log(above / target) / math.log(above / below)
            return float(before + part * (after - before))
    return math.inf


def late_kl(curve: Mapping[str, Any]) -> float:
    """Mean logarithm of the KL in the second half of the steps."""
    steps = curve["step"]
    return statistics.mean(math.log(kl) for kl, step in zip(curve["kl"], steps, strict=True) if 2 * step >= steps[-1])


def mean(logs: Sequence[float]) -> str:
    """`1.05 ± .02`: geometric mean, and standard error of the logarithm."""
    if not logs:
        return "–"
    error = f" ± {statistics.stdev(logs) / len(logs) ** 0.5:.2f}" if len(logs) > 1 else ""
    return f"{math.exp(statistics.mean(logs)):.2f}{error}"


def curves(results: Mapping[str, Any], arm: str) -> dict[tuple[str, float, int], Mapping[str, Any]]:
    """(task, learning rate, seed) → curve of every run of an arm."""
    return {
        (run["task"], run["learning_rate"], run["seed"]): run["curve"]
        for run in results["runs"]
        if run["strategy"] == arm
    }


def rows(before: Mapping[str, Any], after: Mapping[str, Any], against: str, arm: str) -> list[list[str]]:
    """One row per task."""
    theirs, ours = curves(before, against), curves(after, arm)
    lines = []
    for task in dict.fromkeys(task for task, _, _ in ours):
        keys = [key for key in ours if key[0] == task and key in theirs]
        cells = []
        for share in FEW_SHARES:
            pairs = [(interpolated(theirs[key], share), interpolated(ours[key], share)) for key in keys]
            logs = [math.log(their / our) for their, our in pairs if math.isfinite(their) and math.isfinite(our)]
            their, our = (sum(map(math.isfinite, column)) for column in zip(*pairs, strict=True))
            cells.append(mean(logs) + (f" ({their}, {our})" if (their, our) != (len(keys), len(keys)) else ""))
        late = [late_kl(ours[key]) - late_kl(theirs[key]) for key in keys]
        lines.append([f"`{task.split(':')[1]}`", str(len(keys)), *cells, mean(late)])
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="results.json that has the runs of --against")
    parser.add_argument("after", type=Path, help="results.json that has the runs of --arm")
    parser.add_argument("--arm", required=True, help="strategy whose cost is the denominator")
    parser.add_argument("--against", help="strategy whose cost is the numerator; default: --arm")
    args = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    lines = rows(before, after, args.against or args.arm, args.arm)
    if not lines:
        parser.error(f"no run of '{args.arm}' has the task, rate and seed of one of '{args.against or args.arm}'")
    print(table(["task", "seeds", *heads(FEW_SHARES), "KL, second half"], lines))


if __name__ == "__main__":
    main()
