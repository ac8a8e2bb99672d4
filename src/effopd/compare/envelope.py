"""Speed-up over the best-tuned baseline, as a function of the target, tuned on other seeds.

    target(g)          = g · held-out reverse KL at step 0, for shares g from 0.5 to 0.01
    opponent(seed, g)  = arm of the baselines that reaches target(g) in the smallest median cost on
                         all *other* seeds
    speed-up(seed, g)  = cost of the opponent at this seed / cost of the run at this seed
    tuning cost(seed)  = cost of all runs of the baselines with this seed, to their ends

Tuning and reporting on different seeds gives neither side the luck of its noise. With a single seed
there are no others, so the opponent is then tuned on the seed itself. Costs are those at the first
smoothed evaluation at the target. An arm whose cost on the axis is unknown cannot be the opponent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from effopd.compare.axes import COSTS, Axis, cost_on
from effopd.compare.grid_run import Arm, GridRun
from effopd.compare.paired import SeedMedian, median_with_interval, ratio
from effopd.compare.time_to_target import first_evaluation

#: Targets, as shares of the KL at step 0.
CURVE = (0.5, 0.35, 0.25, 0.17, 0.12, 0.1, 0.07, 0.05, 0.035, 0.025, 0.02, 0.014, 0.01)


@dataclass(frozen=True)
class Tuning:
    """Cost of the baselines' whole grid for one seed.

    Attributes:
        cost: median over seeds, in units of the axis; `None`: unknown for a run.
        runs: largest number of runs with one seed.
        seeds: seeds that have this number of runs; the median is over these.
    """

    cost: float | None
    runs: int
    seeds: int


@dataclass(frozen=True)
class Envelope:
    """The baselines of one task, and how fast their best-tuned arm reaches a target.

    Args:
        runs: runs of one task.
        baselines: strategies whose arms compete to be the opponent.
        axis: cost by which arms are ranked and compared.
    """

    runs: Sequence[GridRun]
    baselines: Collection[str] = ("plain",)
    axis: Axis = "seconds"
    _by_place: dict[tuple[Arm, int], GridRun] = field(default_factory=dict, init=False, repr=False)
    _costs: dict[tuple[Arm, int, float], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert not isinstance(self.axis, str) or self.axis in COSTS
        self._by_place.update({(run.arm, run.seed): run for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in ascending order."""
        return sorted({run.seed for run in self.runs})

    @property
    def arms(self) -> list[Arm]:
        """All arms, in the order of the runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def cost(self, arm: Arm, seed: int, share: float) -> float:
        """Cost of an arm's run to `share` of the starting KL; ∞: never; NaN: unknown or no run."""
        key = (arm, seed, share)
        if key not in self._costs:
            self._costs[key] = self._cost(self._by_place.get((arm, seed)), share)
        return self._costs[key]

    def _cost(self, run: GridRun | None, share: float) -> float:
        if run is None or cost_on(run.evaluations[-1], self.axis) is None:
            return math.nan
        reached = first_evaluation(run.evaluations, share * _kl(run, 0))
        if reached is None:
            return math.inf
        cost = cost_on(reached, self.axis)
        return math.nan if cost is None else cost

    def opponent(self, seed: int, share: float) -> Arm | None:
        """Best arm of the baselines for the target, by the median cost on the other seeds.

        Only arms with a run at this seed and a known cost compete. Arms whose median is "never"
        rank by the final KL. `None`: there is no such arm.
        """
        others = [other for other in self.seeds if other != seed] or [seed]
        ranks: dict[Arm, tuple[float, float]] = {}
        for arm in sorted(arm for arm in self.arms if arm[0] in self.baselines):
            costs = [cost for other in others if not math.isnan(cost := self.cost(arm, other, share))]
            if costs and not math.isnan(self.cost(arm, seed, share)):
                finals = [_kl(run, -1) for other in others if (run := self._by_place.get((arm, other)))]
                ranks[arm] = statistics.median(costs), statistics.median(finals)
        return min(ranks, key=ranks.__getitem__, default=None)

    def speedups(self, arm: Arm, share: float) -> dict[int, float]:
        """Speed-up of an arm over the opponent at one target, by seed; as in `paired.ratio`."""
        ratios = {}
        for seed in self.seeds:
            opponent, cost = self.opponent(seed, share), self.cost(arm, seed, share)
            if opponent is not None and not math.isnan(cost):
                ratios[seed] = ratio(*(None if math.isinf(c) else c for c in (self.cost(opponent, seed, share), cost)))
        return ratios

    def speedup(self, arm: Arm, share: float) -> SeedMedian:
        """Paired speed-up of an arm over the opponent at one target, median over seeds."""
        return median_with_interval(list(self.speedups(arm, share).values()))

    def without_costs(self) -> list[Arm]:
        """Arms of the baselines whose cost on the axis is unknown: they cannot be the opponent."""
        return [
            arm for arm in self.arms
            if arm[0] in self.baselines and all(math.isnan(self.cost(arm, seed, 1.0)) for seed in self.seeds)
        ]  # fmt: skip

    def tuning(self) -> Tuning:
        """Cost of tuning the baselines: all their runs with one seed, median over seeds."""
        by_seed: dict[int, list[float | None]] = {}
        for run in self.runs:
            if run.strategy in self.baselines:
                by_seed.setdefault(run.seed, []).append(cost_on(run.evaluations[-1], self.axis))
        most = max(map(len, by_seed.values()), default=0)
        full = [costs for costs in by_seed.values() if len(costs) == most]
        known = [sum(cost for cost in costs if cost is not None) for costs in full if None not in costs]
        return Tuning(statistics.median(known) if known else None, most, len(known) or len(full))


def _kl(run: GridRun, index: int) -> float:
    kl = run.evaluations[index].kl
    assert kl is not None, "`read_run` refuses runs without it"
    return kl
