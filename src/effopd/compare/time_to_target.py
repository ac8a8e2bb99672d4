"""At which cost does a run first get as far as another one ended?

Costs are net: search charged, evaluation not (see `runs/ledger.py`). Works on the evaluations of a
run directory (`runs.records.read_evaluations`) alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from effopd.runs.records import EvaluationRecord

#: Evaluations per smoothing window.
WINDOW = 3
#: Shares of the starting gap at which a speed-up is reported.
GAP_SHARES = (0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class Cost:
    """Optimizer steps, net seconds, net sampled tokens, and net tokens run through a model besides
    sampling.
    """

    steps: int
    seconds: float
    generated_tokens: int
    forward_tokens: int

    @classmethod
    def of(cls, evaluation: EvaluationRecord) -> Cost:
        """What the run had cost at an evaluation."""
        costs = evaluation.costs
        return cls(
            evaluation.step, _number(costs.net_seconds),
            int(_number(costs.net_generated_tokens)), int(_number(costs.net_forward_tokens)),
        )  # fmt: skip

    def ratio(self, other: Cost) -> dict[str, float]:
        """self / other, axis by axis."""
        mine, theirs = asdict(self), asdict(other)
        return {axis: mine[axis] / theirs[axis] for axis in mine}


def _number(value: float | None) -> float:
    assert value is not None  # `grid_run.read_run` refuses runs that lack it
    return value


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Trailing median of the last `window` values (fewer at the beginning).

    One lucky evaluation cannot reach a target: with a window of 3, two of the last three must.

    Example:
        >>> smooth([3.0, 1.0, 2.0, 2.0])
        [3.0, 2.0, 2.0, 2.0]
    """
    return [statistics.median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def smoothed(evaluations: Sequence[EvaluationRecord], metric: str = "kl") -> list[float]:
    """A metric's smoothed values, `kl` or `accuracy`."""
    return smooth([getattr(evaluation, metric) for evaluation in evaluations])


def final_target(evaluations: Sequence[EvaluationRecord], metric: str = "kl") -> float:
    """The last smoothed value of a run: the target other runs have to reach."""
    return smoothed(evaluations, metric)[-1]


def speedup_by_gap(
    baseline: Sequence[EvaluationRecord],
    other: Sequence[EvaluationRecord],
    shares: Sequence[float] = GAP_SHARES,
    metric: str = "kl",
) -> list[dict[str, Any]]:
    r"""Speed-up as a function of the share of the starting gap that has to be closed.

    For each share g: target = (1 − g) · metric at step 0 (a reverse KL to the teacher is itself the
    gap); both runs' smoothed curves have to reach it; ratios are baseline cost / other cost.

    Returns:
        one row per share: `gap_closed`, `target`, and `speedup` by axis, `None` where either run
            never gets there.
    """
    rows = []
    for share in shares:
        target = (1 - share) * getattr(baseline[0], metric)
        costs = [first_reach(run, target, metric) for run in (baseline, other)]
        ratio = costs[0].ratio(costs[1]) if costs[0] and costs[1] else None
        rows.append({"gap_closed": share, "target": target, "speedup": ratio})
    return rows


def first_reach(
    evaluations: Sequence[EvaluationRecord], target: float, metric: str = "kl", *, higher_is_better: bool = False
) -> Cost | None:
    """Cost at the first evaluation (after step 0) whose smoothed metric is at or below `target` (at
    or above, if higher is better); `None` if never."""
    sign = -1.0 if higher_is_better else 1.0
    for evaluation, value in zip(evaluations, smoothed(evaluations, metric), strict=True):
        if sign * value <= sign * target and evaluation.step > 0:
            return Cost.of(evaluation)
    return None
