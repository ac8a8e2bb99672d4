"""Speed-up over the best-tuned baseline, as a function of the target, tuned on other seeds.

    target(g)          = g · held-out reverse KL at step 0, for shares g of 0.5, 0.25, 0.1, …
    opponent(seed, g)  = arm of the baselines that reaches target(g) in the smallest median cost on
                         all *other* seeds
    speed-up(seed, g)  = cost of the opponent at this seed / cost of the run at this seed

Tuning and reporting on different seeds gives neither side the luck of its noise. With a single seed
there are no others, so the opponent is then tuned on the seed itself. Costs are those at the first
smoothed evaluation at the target.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from effopd.compare.grid_run import AXES, Arm, GridRun
from effopd.compare.paired import SeedMedian, median_with_interval, ratio
from effopd.compare.time_to_target import Cost

#: Targets, as shares of the KL at step 0.
SHARES = (0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Envelope:
    """The baselines of one task, and how fast their best-tuned arm reaches a target.

    Args:
        runs: runs of one task.
        baselines: strategies whose arms compete to be the opponent.
        axis: cost by which arms are ranked and compared, one of `grid_run.AXES`.
    """

    runs: Sequence[GridRun]
    baselines: Collection[str] = ("plain",)
    axis: str = "seconds"
    _by_place: dict[tuple[Arm, int], GridRun] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.axis in AXES
        self._by_place.update({(run.arm, run.seed): run for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in ascending order."""
        return sorted({run.seed for run in self.runs})

    def cost(self, arm: Arm, seed: int, share: float) -> float | None:
        """Cost of an arm's run until `share` of the starting KL; `None`: never, or no such run."""
        run = self._by_place.get((arm, seed))
        if run is None:
            return None
        reached: Cost | None = run.cost(share * _kl(run, 0), "kl", False)
        return None if reached is None else float(getattr(reached, self.axis))

    def opponent(self, seed: int, share: float) -> Arm:
        """Best arm of the baselines for the target, by the median cost on the other seeds.

        Arms whose median is "never" rank by the final KL.
        """
        others = [other for other in self.seeds if other != seed] or [seed]
        arms = sorted({run.arm for run in self.runs if run.strategy in self.baselines})

        def rank(arm: Arm) -> tuple[float, float]:
            made = [other for other in others if (arm, other) in self._by_place]
            costs = [math.inf if (c := self.cost(arm, other, share)) is None else c for other in made]
            finals = [_kl(self._by_place[arm, other], -1) for other in made]
            if not made:
                return math.inf, math.inf
            return statistics.median(costs), statistics.median(finals)

        return min(arms, key=rank)

    def speedup(self, arm: Arm, share: float) -> SeedMedian:
        """Paired speed-up of an arm over the opponent at one target, median over seeds."""
        ratios = [
            ratio(self.cost(self.opponent(seed, share), seed, share), self.cost(arm, seed, share))
            for seed in self.seeds
            if (arm, seed) in self._by_place and (self.opponent(seed, share), seed) in self._by_place
        ]
        return median_with_interval(ratios)


def _kl(run: GridRun, index: int) -> float:
    kl = run.evaluations[index].kl
    assert kl is not None, "`read_run` refuses runs without it"
    return kl
