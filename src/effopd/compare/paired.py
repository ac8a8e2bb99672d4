"""Medians of paired speed-ups over seeds, with intervals that include runs that miss the target.

A speed-up is baseline cost / run cost at the same seed. If the run never reaches the target, the
speed-up is 0; if only the baseline never reaches it, the speed-up is ∞. Both stay in the median and
in the resampling, which only need the order of the values. Pairs in which neither reaches the
target are counted but not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from effopd.common.statistics import resampled

DRAWS = 4000


@dataclass(frozen=True)
class SeedMedian:
    """A median over seeds with its 95 % interval.

    Attributes:
        median, low, high: 0: the run never reaches the target; ∞: the baseline never reaches it;
            NaN: there are no pairs.
        n: pairs used.
        censored: pairs used whose value is 0.
        undefined: pairs in which neither reaches the target.
    """

    median: float
    low: float
    high: float
    n: int
    censored: int = 0
    undefined: int = 0

    def to_row(self) -> dict[str, float | int | None]:
        """JSON-ready dictionary; ∞ and NaN become `None` (`n` is 0 without pairs)."""
        return {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in asdict(self).items()}


def ratio(baseline: float | None, cost: float | None) -> float:
    """baseline / cost; `None`: target not reached. 0 without cost, ∞ without baseline, else NaN."""
    if cost is None:
        return math.nan if baseline is None else 0.0
    return math.inf if baseline is None else baseline / cost


def median_with_interval(
    values: Sequence[float],
    draws: int = DRAWS,
    seed: int = 0,
    *,
    zero_is_never: bool = True,
) -> SeedMedian:
    """Median over seeds with its 95 % percentile bootstrap interval; NaNs count as undefined.

    With 2 to 5 values the interval is their range. It covers the true median of the distribution
    with probability 1 − 2·0.5ⁿ, 93.75 % for five values. For an even number of values, the two
    middle ones are averaged: 0 with any value gives 0, so that runs that miss the target are not
    averaged away, and ∞ with any other value gives ∞.

    Args:
        values: one per seed; 0 and ∞ are allowed.
        draws: resamples. The same `seed` and values give the same interval.
        zero_is_never: whether 0 means that the run never reaches the target; otherwise 0 is an
            ordinary number.

    Example:
        >>> median_with_interval([2.0, 2.5, 3.0, 0.0, 2.2])
        SeedMedian(median=2.2, low=0.0, high=3.0, n=5, censored=1, undefined=0)
    """
    x = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    undefined = len(values) - len(x)
    if not len(x):
        return SeedMedian(math.nan, math.nan, math.nan, 0, 0, undefined)
    medians = resampled(x, lambda rows: _medians(rows, zero_is_never), draws, seed)
    low, high = np.quantile(medians, (0.025, 0.975), method="closest_observation")
    middle = float(_medians(x[None], zero_is_never)[0])
    return SeedMedian(middle, float(low), float(high), len(x), zero_is_never * int((x == 0).sum()), undefined)


def _medians(rows: np.ndarray, zero_is_never: bool) -> np.ndarray:
    """Median of each row; the mean of 0 ("never") and any value is 0, of ∞ and another value ∞."""
    ordered = np.sort(rows, axis=1)
    n = rows.shape[1]
    lower, upper = ordered[:, (n - 1) // 2], ordered[:, n // 2]
    with np.errstate(invalid="ignore"):
        return np.where((zero_is_never & (lower == 0)) | (lower == upper), lower, (lower + upper) / 2)
