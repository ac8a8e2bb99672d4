"""Cost at which a run first reaches a target, such as the final KL of another run.

Costs are net: search is charged, evaluation is not (see `runs/ledger.py`). The only input is a
run's evaluations (`runs.records.read_evaluations`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from effopd.runs.records import EvaluationRecord

#: Evaluations per smoothing window.
WINDOW = 3
#: Shares of the initial gap at which a speed-up is reported.
GAP_SHARES = (0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class Cost:
    """Optimizer steps, net seconds, net sampled tokens, and net forward tokens outside sampling."""

    steps: int
    seconds: float
    generated_tokens: int
    forward_tokens: int

    @classmethod
    def of(cls, evaluation: EvaluationRecord) -> Cost:
        """Cost of the run up to an evaluation."""
        costs = evaluation.costs
        return cls(
            evaluation.step, _number(costs.net_seconds),
            int(_number(costs.net_generated_tokens)), int(_number(costs.net_forward_tokens)),
        )  # fmt: skip

    def ratio(self, other: Cost) -> dict[str, float]:
        """self / other, per axis; NaN where one of them costs nothing."""
        ours, theirs = asdict(self), asdict(other)
        return {axis: ours[axis] / theirs[axis] if ours[axis] and theirs[axis] else math.nan for axis in ours}


def _number(value: float | None) -> float:
    assert value is not None  # `grid_run.read_run` refuses runs that lack it
    return value


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Trailing median of the last `window` values (fewer at the beginning).

    A single outlier cannot reach a target: with a window of 3, two of the last three values must.

    Example:
        >>> smooth([3.0, 1.0, 2.0, 2.0])
        [3.0, 2.0, 2.0, 2.0]
    """
    return [statistics.median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def smoothed(evaluations: Sequence[EvaluationRecord], metric: str = "kl") -> list[float]:
    """Smoothed values of a metric, `kl` or `accuracy`."""
    return smooth([getattr(evaluation, metric) for evaluation in evaluations])


def final_target(evaluations: Sequence[EvaluationRecord], metric: str = "kl") -> float:
    """Last smoothed value of a run, used as the target for other runs."""
    return smoothed(evaluations, metric)[-1]


def speedup_by_gap(
    baseline: Sequence[EvaluationRecord],
    other: Sequence[EvaluationRecord],
    shares: Sequence[float] = GAP_SHARES,
    metric: str = "kl",
) -> list[dict[str, Any]]:
    r"""Baseline cost / other cost, as a function of the share g of the initial gap to close.

    The target is (1 − g) · metric at step 0, because a reverse KL to the teacher is itself the gap.
    Both runs' smoothed curves have to reach the target.

    Returns:
        One row per share: `gap_closed`, `target`, and `speedup` by axis (`None`: one of the runs
        never reaches the target).
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
    """Cost at the first evaluation after step 0 whose smoothed metric reaches `target`.

    The target is reached at or below it, or at or above it if higher is better. `None`: never.
    """
    evaluation = first_evaluation(evaluations, target, metric, higher_is_better=higher_is_better)
    return None if evaluation is None else Cost.of(evaluation)


def first_evaluation(
    evaluations: Sequence[EvaluationRecord], target: float, metric: str = "kl", *, higher_is_better: bool = False
) -> EvaluationRecord | None:
    """The first evaluation after step 0 whose smoothed metric reaches `target`; `None`: never.

    Nothing reaches a target that is not finite, which every value would meet.
    """
    if not math.isfinite(target):
        return None
    sign = -1.0 if higher_is_better else 1.0
    for evaluation, value in zip(evaluations, smoothed(evaluations, metric), strict=True):
        if sign * value <= sign * target and evaluation.step > 0:
            return evaluation
    return None
