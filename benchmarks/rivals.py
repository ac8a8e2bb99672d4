"""Tables of docs/rivals.md, from results.json in docs/rivals and docs/other_teacher.

    pip install 'effopd[optimizers]'
    effopd compare recipes/compare-rivals.yaml          # --only spreads it over days
    effopd compare --report runs/rivals --out docs/rivals \\
        --prices recipes/prices/1.7b-8b-1xh100.yaml --prices recipes/prices/4b-32b-8xh100.yaml
    effopd testbed other
    effopd compare recipes/compare-other-teacher.yaml
    effopd compare --report runs/other-teacher --out docs/other_teacher \\
        --prices recipes/prices/1.7b-8b-1xh100.yaml
    python benchmarks/readme_results.py --figure

`readme_results.py` rewrites the blocks between the markers (`pages.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from effopd.compare.axes import axis_name
from effopd.compare.grid_run import Arm
from effopd.compare.prices import PriceList, read_prices
from effopd.compare.time_to_target import smooth
from effopd.report.compare_envelope import TABLE_SHARES, curves
from effopd.report.compare_lookup import Lookup, factor, one, table
from effopd.runs.records import Costs

#: Price list of the tables of the arm that is fastest in hindsight, and one for larger models.
SMALL, LARGE = (
    Path(__file__).parents[1] / "recipes" / "prices" / name for name in ("1.7b-8b-1xh100.yaml", "4b-32b-8xh100.yaml")
)
#: Targets of the README's table.
FEW_SHARES = (0.5, 0.25, 0.1, 0.05, 0.025)


#: A cost at every evaluation of a curve.
Cost = Callable[[Mapping[str, Any]], Sequence[float]]


@cache
def _prices(path: Path) -> PriceList:
    (prices,) = read_prices([path])
    return prices


def priced(curve: Mapping[str, Any], path: Path = SMALL) -> Sequence[Any]:
    """Seconds at every evaluation of a curve by a price list."""
    prices = _prices(path)
    columns = (curve[name] for name in ("generated_tokens", "forward_tokens", "backward_tokens", "teacher_tokens"))
    spent = [
        Costs(
            net_generated_tokens=sampled,
            net_forward_tokens=forward,
            update_forward_tokens=backward,
            teacher_forward_tokens=teacher,  # those of searches included
            search_teacher_tokens=0,
        )
        for sampled, forward, backward, teacher in zip(*columns, strict=True)
    ]
    return [prices.seconds(each) for each in spent]


def costs() -> dict[str, Cost]:
    """Name → cost, in the tables of the arm that is fastest in hindsight."""
    return {
        "steps": lambda curve: curve["step"],
        "net seconds": lambda curve: curve["seconds"],
        "sampled tokens": lambda curve: curve["generated_tokens"],
        axis_name(f"priced:{_prices(SMALL).name}"): priced,
    }


def heads(shares: Sequence[float]) -> list[str]:
    """Column titles of targets."""
    return [f"{100 * share:.3g} %" for share in shares]


def speeds(part: Mapping[str, Any], task: str, axis: str, strategy: str, shares: Sequence[float]) -> list[str]:
    """Cells `1.10–1.40×`: range over a strategy's learning rates of the median over seeds."""
    cells = []
    for share in shares:
        index = part["shares"].index(share)
        rows = [row for _, row in curves(part, task, axis, strategy) if row["n"][index]]
        medians = sorted(math.inf if row["median"][index] is None else row["median"][index] for row in rows)
        ends = [one(None if math.isinf(value) else value, "") for value in (medians[:1] + medians[-1:])]
        text = "–".join(dict.fromkeys(ends)) or "–"
        cells.append(text + "×" if text[-1].isdigit() else text)  # not after “> any” and “never”
    return cells


def envelope_table(results: Mapping[str, Any]) -> str:
    """Speed-up over the best-tuned run, per cost, task and strategy."""
    part, look = results["envelope"], Lookup(results)
    rows = [
        [
            axis_name(axis),
            f"`{task.split(':')[1]}`",
            f"`{strategy}`",
            *speeds(part, task, axis, strategy, TABLE_SHARES),
        ]
        for axis in part["axes"]
        for task in look.tasks
        for strategy in opening(results)
    ]
    return table(["cost", "task", "strategy", *heads(TABLE_SHARES)], rows)


def opening(results: Mapping[str, Any]) -> list[str]:
    """The look-aheads with a row in the envelope, in the plan's order."""
    known = {row["strategy"] for row in results["envelope"]["speedups"]}
    return [name for name in Lookup(results).roles.opening(sorted(known)) if name in known]


def steps_table(results: Mapping[str, Any], shares: Sequence[float] = TABLE_SHARES) -> str:
    """Steps of every arm to every target: median over seeds, with the number of seeds."""
    return costs_table(results, costs()["steps"], shares)


def costs_table(results: Mapping[str, Any], cost: Cost, shares: Sequence[float] = TABLE_SHARES) -> str:
    """Cost of every arm to every target: median over seeds, with the number of seeds."""
    look = Lookup(results)
    rows = []
    for task in look.tasks:
        for strategy, rate in look.arms:
            runs = look.runs(task, (strategy, rate))
            if runs:
                cells = [_median([run_cost(run, share, cost) for run in runs]) for share in shares]
                rows.append(
                    [f"`{task.split(':')[1]}`", f"`{strategy}`", factor(rate, look.reference), str(len(runs)), *cells]
                )
    return table(["task", "arm", "rate", "seeds", *heads(shares)], rows)


def ends_table(results: Mapping[str, Any]) -> str:
    """KL at the end and its largest value in the second half, of arms with several seeds."""
    look, rows = Lookup(results), []
    for task in look.tasks:
        for strategy, rate in look.arms:
            runs = look.runs(task, (strategy, rate))
            if len(runs) >= Hindsight.SEEDS:
                ends, peaks = zip(*(_end(run["curve"]) for run in runs), strict=True)
                arm = [f"`{task.split(':')[1]}`", f"`{strategy}`", factor(rate, look.reference), str(len(runs))]
                rows.append([*arm, spread(ends, ".4f"), spread(peaks, ".4f")])
    return table(["task", "arm", "rate", "seeds", "KL at the end", "largest KL in the second half"], rows)


def _end(curve: Mapping[str, Any]) -> tuple[float, float]:
    """Median of the last three KLs, and largest KL of the second half."""
    half = curve["step"][-1] / 2
    late = [kl for kl, step in zip(curve["kl"], curve["step"], strict=True) if step >= half]
    return statistics.median(curve["kl"][-3:]), max(late)


def spread(values: Sequence[float], form: str) -> str:
    """`0.0014 (0.0012–0.0020)`: median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def _median(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return "–" if math.isinf(middle) else f"{middle:.4g}"


def coverage(results: Mapping[str, Any]) -> str:
    """Number of runs, seeds and arms behind the tables."""
    runs, baselines = results["runs"], set(results["settings"]["baselines"])
    rivals = {(run["strategy"], run["learning_rate"]) for run in runs if run["strategy"] in baselines}
    several = {arm for arm in rivals if _seeds(runs, arm) > 1}
    return (
        f"{len(runs)} of {results['settings']['planned_runs']} planned runs exist: {len(rivals)} arms without a "
        f"look-ahead, {len(several)} of them with several seeds. The others ran on one seed, for a first look."
    )


def _seeds(runs: Sequence[Mapping[str, Any]], arm: tuple[str, float]) -> int:
    return len({run["seed"] for run in runs if (run["strategy"], run["learning_rate"]) == arm})


class Hindsight:
    """Median costs of all arms to the targets, and the fastest baseline known afterwards.

    Differs from the envelope: the opponent is chosen on the seeds that it is reported on, which
    favors the baselines. With few seeds this is the safer side, because an arm that is chosen on
    two other seeds is often a poor choice.

    Args:
        results: results.json of the grid.
        cost: the cost to compare.
        baselines: strategies that compete; default: the plan's baselines.
        early: results.json of a grid with more evaluations in the first steps. Down to `EARLY` of
            the starting KL, two arms that both ran there are compared there.
    """

    #: Seeds that an arm needs to compete.
    SEEDS = 2
    #: Lowest target for which `early` counts.
    EARLY = 0.25

    def __init__(
        self,
        results: Mapping[str, Any],
        cost: Cost,
        baselines: Collection[str] | None = None,
        early: Mapping[str, Any] | None = None,
    ):
        self._look, self._cost = Lookup(results), cost
        self._baselines = results["settings"]["baselines"] if baselines is None else baselines
        self._early = None if early is None else Hindsight(early, cost, self._baselines)
        self._known: dict[tuple[str, Arm, float], float] = {}

    def cost(self, task: str, arm: Arm, share: float) -> float:
        """Median cost over seeds; ∞: most runs never reach the target, or there are no runs."""
        key = task, arm, share
        if key not in self._known:
            runs = self._look.runs(task, arm)
            self._known[key] = (
                statistics.median([run_cost(run, share, self._cost) for run in runs]) if runs else math.inf
            )
        return self._known[key]

    def best(self, task: str, share: float) -> tuple[float, Arm | None]:
        """Smallest cost of a baseline, and its arm."""
        early = self._grid(share)
        if early is not self and early.competing(task):
            return early.best(task, share)
        return min(((self.cost(task, arm, share), arm) for arm in self.competing(task)), default=(math.inf, None))

    def competing(self, task: str) -> list[Arm]:
        """Arms of the baselines that ran on enough seeds."""
        arms = [arm for arm in self._look.arms if arm[0] in self._baselines]
        return [arm for arm in arms if len(self._look.runs(task, arm)) >= self.SEEDS]

    def ran(self, task: str, strategy: str) -> list[Arm]:
        """Arms of a strategy that ran, one per learning rate."""
        return [arm for arm in self._look.arms if arm[0] == strategy and self._look.runs(task, arm)]

    def ratio(self, task: str, rival: Arm, own: Arm, share: float) -> float:
        """Cost of a baseline's arm / cost of another arm; NaN: neither reaches the target.

        ∞: only `own` does; 0: only the baseline does.
        """
        early = self._grid(share)
        both = rival in early.competing(task) and own in early.ran(task, own[0])
        grid = early if both else self
        return quotient(grid.cost(task, rival, share), grid.cost(task, own, share))

    def lead(self, task: str, own: Arm, share: float) -> float:
        """Smallest `ratio` over the baselines' arms: that of the fastest one."""
        early = self._grid(share)
        rivals = dict.fromkeys([*self.competing(task), *early.competing(task)])
        ratios = [self.ratio(task, rival, own, share) for rival in rivals]
        known = [ratio for ratio in ratios if not math.isnan(ratio)]
        return min(known, default=math.nan)

    def _grid(self, share: float) -> Hindsight:
        return self._early if self._early is not None and share >= self.EARLY else self

    def ratios(self, task: str, strategy: str, share: float) -> str:
        """Cell `0.83–1.05×`: best baseline's cost / the strategy's, range over learning rates."""
        leads = [self.lead(task, arm, share) for arm in self.ran(task, strategy)]
        values = sorted(lead for lead in leads if 0 < lead < math.inf)
        alone = leads.count(math.inf)
        if not values and 0 not in leads:
            reached = "" if alone == len(leads) else f" ({alone} of {len(leads)})"
            return "> any" + reached if alone else "–"
        ends = [f"{value:.2f}" for value in (values[:1] + values[-1:])]
        if len(values) < len(leads):
            ends = ["0", *ends[-1:]]
        return "–".join(dict.fromkeys(ends)) + "×"

    def opponent(self, task: str, share: float) -> str:
        """Name of the best baseline."""
        cost, arm = self.best(task, share)
        return "none" if arm is None or math.isinf(cost) else f"`{arm[0]}` {factor(arm[1], self._look.reference)}"


def quotient(other: float, own: float) -> float:
    """other / own; ∞: only `own` is finite, 0: only `other` is, NaN: neither is."""
    if math.isinf(own):
        return math.nan if math.isinf(other) else 0.0
    return other / own


def run_cost(run: Mapping[str, Any], share: float, cost: Cost) -> float:
    """Cost of a run to a share of its starting KL (trailing median of three); ∞: never reached."""
    curve = run["curve"]
    kl = smooth(curve["kl"])
    reached = (
        spent
        for spent, step, value in zip(cost(curve), curve["step"], kl, strict=True)
        if step > 0 and value <= share * kl[0]
    )
    return next(reached, math.inf)


def hindsight_table(results: Mapping[str, Any], shares: Sequence[float] = TABLE_SHARES) -> str:
    """Cost of the baseline that is fastest in hindsight, divided by that of the look-ahead."""
    rows = []
    for name, cost in costs().items():
        known = Hindsight(results, cost)
        for task in Lookup(results).tasks:
            label = f"`{task.split(':')[1]}`"
            for strategy in (each for each in opening(results) if known.ran(task, each)):
                rows.append([name, label, f"`{strategy}`", *(known.ratios(task, strategy, share) for share in shares)])
            rows.append([name, label, "opponent", *(known.opponent(task, share) for share in shares)])
    return table(["cost", "task", "strategy", *heads(shares)], rows)


def blocks(results: Mapping[str, Any], other_teacher: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of docs/rivals.md.

    Args:
        results: results.json of the rivals.
        other_teacher: results.json of the grid with teachers that are no copies of the student.
    """
    return {
        "coverage": coverage(results),
        "hindsight": hindsight_table(results),
        "envelope": envelope_table(results),
        "steps": steps_table(results),
        "ends": ends_table(results),
        "other teacher": hindsight_table(other_teacher, FEW_SHARES),
        "other teacher, steps": steps_table(other_teacher, FEW_SHARES),
        "other teacher, ends": ends_table(other_teacher),
    }
