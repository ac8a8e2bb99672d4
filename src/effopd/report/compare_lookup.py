"""Lookup of rows in results.json, and formatting of numbers with intervals."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from effopd.compare.grid_run import Arm
from effopd.compare.roles import Roles
from effopd.compare.speedups import ALL, BEST, SAME

Results = Mapping[str, Any]
Row = Mapping[str, Any]
AXIS_NAMES = {
    "steps": "steps",
    "seconds": "net seconds",
    "generated_tokens": "sampled tokens",
    "forward_tokens": "forward tokens",
}
#: With fewer seeds than this, the range replaces the interval.
FEW = 5


class Lookup:
    """Rows of results.json by task, arm, cost axis and target."""

    def __init__(self, results: Results):
        self.results = results
        self.roles = Roles.of_settings(results["settings"])
        self.baseline, self.reference = self.roles.reference
        self.tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
        self.scopes = [*self.tasks, ALL] if len(self.tasks) > 1 else self.tasks
        self.arms = list(dict.fromkeys((run["strategy"], run["learning_rate"]) for run in results["runs"]))
        self._speedups = {
            (
                r["task"],
                r["strategy"],
                r["learning_rate"],
                r["against"],
                r["against_learning_rate"] if r["against_learning_rate"] in (BEST, SAME) else None,
                r["target"],
                r["axis"],
            ): r
            for r in results["speedups"]
        }
        self._quality = {(r["task"], r["strategy"], r["learning_rate"], r["measure"]): r for r in results["quality"]}

    def swept(self) -> list[str]:
        """Strategies that ran at several learning rates."""
        rates: dict[str, set[float]] = {}
        for strategy, rate in self.arms:
            rates.setdefault(strategy, set()).add(rate)
        return [strategy for strategy, of_strategy in rates.items() if len(of_strategy) > 1]

    def swept_to_target(self, target: str = "reference_kl") -> list[str]:
        """Those of `swept` that have runs with this target, so whose seed the baseline ran too."""
        runs = [run for run in self.results["runs"] if target in run["targets"]]
        return [strategy for strategy in self.swept() if any(run["strategy"] == strategy for run in runs)]

    def at_reference(self) -> list[str]:
        """Strategies that ran at the reference learning rate, in the plan's order."""
        return [strategy for strategy, rate in self.arms if rate == self.reference]

    def compared(self) -> list[str]:
        """Those of `at_reference` with a speed-up over the baseline at that rate."""

        def known(strategy: str) -> bool:
            rows = (self.speedup(task, (strategy, self.reference), "steps") for task in self.tasks)
            return any(row is not None and row["n"] for row in rows)

        return [name for name in self.at_reference() if name != self.baseline and known(name)]

    def drawn_rates(self) -> dict[str, float]:
        """Strategy → the learning rate of its curve: the reference rate.

        If it did not run there: of the rates with the most runs, the nearest in log distance.
        """
        runs = Counter((run["strategy"], run["learning_rate"]) for run in self.results["runs"])

        def order(arm: Arm) -> tuple[bool, int, float]:
            return arm[1] == self.reference, runs[arm], -abs(math.log(arm[1] / self.reference))

        return {arm[0]: max((other for other in self.arms if other[0] == arm[0]), key=order)[1] for arm in self.arms}

    def speedup(
        self,
        task: str,
        arm: Arm,
        axis: str,
        target: str = "reference_kl",
        against: str | None = None,
        rate: str | None = None,
    ) -> Row | None:
        """Row of `speedups`, or `None`.

        Args:
            against: the opponent. `None`: the baseline.
            rate: learning rate of the opponent. `None`: the reference rate; `BEST`: its best rate
                (baseline only); `SAME`: the arm's own.
        """
        return self._speedups.get((task, *arm, against or self.baseline, rate, target, axis))

    def quality(self, task: str, arm: Arm, measure: str) -> Row | None:
        """Row of `quality`, or `None`."""
        return self._quality.get((task, *arm, measure))

    def runs(self, task: str, arm: Arm) -> list[Row]:
        """Runs of an arm on a task."""
        return [r for r in self.results["runs"] if r["task"] == task and (r["strategy"], r["learning_rate"]) == arm]

    def best(self, task: str, target: str = "reference_kl") -> float | None:
        """The baseline's best learning rate for a target."""
        return self.results["best_learning_rate"].get(task, {}).get(target)

    def again(self, task: str, arm: Arm, target: str = "reference_kl") -> str:
        """Share of evaluations after reaching the target that miss it again, as text."""
        shares = [run["targets"][target]["above_again"] for run in self.runs(task, arm) if target in run["targets"]]
        of_arrived = [share for share in shares if share is not None]
        return f"{statistics.mean(of_arrived):.0%}" if of_arrived else "–"

    def reached(self, task: str, arm: Arm, target: str = "reference_kl") -> str:
        """Number of runs that reached the target, as `3 of 5`."""
        runs = [run["targets"][target] for run in self.runs(task, arm) if target in run["targets"]]
        return f"{sum(run['reached'] for run in runs)} of {len(runs)}"


def times(row: Row | None) -> str:
    """A speed-up as text: `1.92× [1.70, 3.43]` with its 95 % interval.

    With fewer than five seeds, `1.92× (1.70–3.43, n = 3)` with their range. `never`: the target is
    not reached; `> any`: the opponent does not reach it.
    """
    if row is None or not row["n"]:
        return "–"
    median, low, high, n = one(row["median"]), one(row["low"], ""), one(row["high"], ""), row["n"]
    if n >= FEW:
        return f"{median} [{low}, {high}]"
    return f"{median} (n = 1)" if n == 1 else f"{median} ({low}–{high}, n = {n})"


def one(value: float | None, unit: str = "×") -> str:
    """One value of a speed-up as text: `never` for 0, `> any` for `None`."""
    if value is None:
        return "> any"
    return "never" if value == 0 else f"{value:.2f}{unit}"


def number(row: Row | None, form: str = ".4f") -> str:
    """A median with its interval (few seeds: range) as text; `–`: no data; `diverged`: infinite."""
    if row is None or not row["n"]:
        return "–"
    median, low, high = ("diverged" if row[end] is None else f"{row[end]:{form}}" for end in ("median", "low", "high"))
    if row["n"] >= FEW:
        return f"{median} [{low}, {high}]"
    return median if row["n"] == 1 else f"{median} ({low} to {high})"


class Table(NamedTuple):
    """A table of a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def factor(rate: float, reference: float) -> str:
    """A learning rate as a multiple of the reference: `×3`."""
    return f"×{rate / reference:.2g}"
