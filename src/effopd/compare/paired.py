"""Medians over seeds of paired speed-ups, with intervals that include the runs which never arrive.

A speed-up is baseline cost / cost of the same seed. Where only one of the two arrives, the ratio is
still ordered against all others: a run that never arrives is slower than any that does (0), a
baseline that never arrives makes whoever does arrive faster than any number (∞). So they stay in
the median and in the resampling, which need no more than the order. Where neither arrives there is
nothing to compare; those pairs are counted, not used.
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
        median, low, high: 0 means "never arrives", ∞ "the baseline never arrives"; NaN without
            pairs.
        n: pairs used.
        censored: how many of them are 0.
        undefined: pairs in which neither arrives.
    """

    median: float
    low: float
    high: float
    n: int
    censored: int = 0
    undefined: int = 0

    def to_row(self) -> dict[str, float | int | None]:
        """JSON-ready: ∞ and NaN become `None` (`censored` and `n` say which)."""
        return {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in asdict(self).items()}


def ratio(baseline: float | None, cost: float | None) -> float:
    """baseline / cost, where `None` is "never arrives": 0, ∞ or NaN (neither) then."""
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
    """Median and percentile bootstrap interval (2.5 %, 97.5 %) over seeds, NaNs counted as
    undefined.

    With 2 to 5 values the interval is their range: it covers the true median of whatever n values
    are drawn from with probability 1 − 2·0.5ⁿ, 93.75 % for five. Of an even number, the two middle
    values are averaged; 0 with anything gives 0, so that a half that never arrives is not averaged
    away, and otherwise ∞ with anything gives ∞.

    Args:
        values: one per seed; 0 and ∞ are allowed.
        draws: resamples. The same `seed` and values give the same interval.
        zero_is_never: whether 0 stands for a run that never arrives; if not, it is a number like
            any other.

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
    """Median of each row; the mean of 0 ("never") and anything is 0, of ∞ and anything else ∞."""
    ordered = np.sort(rows, axis=1)
    n = rows.shape[1]
    lower, upper = ordered[:, (n - 1) // 2], ordered[:, n // 2]
    with np.errstate(invalid="ignore"):
        return np.where((zero_is_never & (lower == 0)) | (lower == upper), lower, (lower + upper) / 2)
