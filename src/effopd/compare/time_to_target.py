"""When did a run first get as far as another one ended, and what had it cost by then?

Works on the rows of `evals.jsonl` alone, so it can be redone on any run directory. Costs are net: search charged,
evaluation not (see `runs/ledger.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Evaluations per smoothing window.
WINDOW = 3
#: Shares of the starting gap at which a speed-up is reported.
GAP_SHARES = (0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class Cost:
    """What a run had spent at some evaluation: optimizer steps, net seconds, net sampled tokens, and net tokens run
    through a model besides sampling."""

    steps: int
    seconds: float
    generated_tokens: int
    forward_tokens: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cost:
        """The cost recorded in a row of `evals.jsonl`."""
        return cls(
            row["step"],
            row["cost/net_seconds"],
            int(row["cost/net_generated_tokens"]),
            int(row["cost/net_forward_tokens"]),
        )

    def ratio(self, other: Cost) -> dict[str, float]:
        """self / other, axis by axis."""
        mine, theirs = asdict(self), asdict(other)
        return {axis: mine[axis] / theirs[axis] for axis in mine}


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Trailing median of the last `window` values (fewer at the beginning).

    One lucky evaluation cannot reach a target: with a window of 3, two of the last three must.

    Example:
        >>> smooth([3.0, 1.0, 2.0, 2.0])
        [3.0, 2.0, 2.0, 2.0]
    """
    return [statistics.median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def final_target(rows: Sequence[Mapping[str, Any]], metric: str = "eval_kl") -> float:
    """The last smoothed value of a run: the target other runs have to reach."""
    return smooth([row[metric] for row in rows])[-1]


def speedup_by_gap(
    baseline: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    shares: Sequence[float] = GAP_SHARES,
    metric: str = "eval_kl",
) -> list[dict[str, Any]]:
    r"""Speed-up as a function of how far one wants to go.

    For each share g of the starting gap: target = (1 − g) · metric at step 0 (a reverse KL to the teacher is itself
    the gap); both runs' smoothed curves have to reach it; ratios are baseline cost / other cost.

    Returns:
        one row a share: `gap_closed`, `target`, and `speedup` by axis, `None` where either run never gets there.
    """
    rows = []
    for share in shares:
        target = (1 - share) * baseline[0][metric]
        costs = [first_reach(run, target, metric) for run in (baseline, other)]
        ratio = costs[0].ratio(costs[1]) if costs[0] and costs[1] else None
        rows.append({"gap_closed": share, "target": target, "speedup": ratio})
    return rows


def first_reach(
    rows: Sequence[Mapping[str, Any]], target: float, metric: str = "eval_kl", *, higher_is_better: bool = False
) -> Cost | None:
    """Cost at the first evaluation (after step 0) whose smoothed metric is at or below `target` (at or above, if
    higher is better); `None` if never."""
    sign = -1.0 if higher_is_better else 1.0
    for row, value in zip(rows, smooth([row[metric] for row in rows]), strict=True):
        if sign * value <= sign * target and row["step"] > 0:
            return Cost.of(row)
    return None
