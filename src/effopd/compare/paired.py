"""Medians of paired speed-ups over seeds, with intervals that include runs that miss the target.

A speed-up is baseline cost / run cost at the same seed. If the run never reaches the target, the
speed-up is 0; if only the baseline never reaches it, the speed-up is ∞. Both stay in the median and
in its interval, which only need the order of the values. Pairs in which neither reaches the target,
or in which one costs nothing (tokens sampled by a run on stored answers), are counted but not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

#: Smallest coverage of the interval, if there are enough values for it.
_COVERAGE = 0.95


@dataclass(frozen=True)
class SeedMedian:
    """A median over seeds with its 95 % interval.

    Attributes:
        median, low, high: 0: the run never reaches the target; ∞: the baseline never reaches it;
            NaN: there are no pairs.
        n: pairs used.
        censored: pairs used whose value is 0.
        undefined: pairs in which neither reaches the target, or one costs nothing.
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
    """baseline / cost; `None`: target not reached.

    0: only the baseline reaches it; ∞: only the run does; NaN: neither does, or a cost is 0.
    """
    if cost is None:
        return math.nan if baseline is None else 0.0
    if baseline is None:
        return math.inf
    return baseline / cost if baseline and cost else math.nan


def coverage(n: int) -> float:
    """Probability that `median_with_interval` of n values covers the true median."""
    return 1 - 2 * _below(n, _skipped(n))


def median_with_interval(values: Sequence[float], *, zero_is_never: bool = True) -> SeedMedian:
    """Median over seeds with its 95 % interval; NaNs count as undefined.

    The interval is the shortest one between the k-th smallest and the k-th largest value that
    covers the true median of any continuous distribution with a probability of at least 95 %. With
    2 to 5 values there is none, and it is their range, which covers the median with probability 1 −
    2·0.5ⁿ, 93.75 % for five values. For an even number of values, the two middle ones are averaged:
    0 with any value gives 0, so that runs that miss the target are not averaged away, and ∞ with
    any other value gives ∞.

    Args:
        values: one per seed; 0 and ∞ are allowed.
        zero_is_never: whether 0 means that the run never reaches the target; otherwise 0 is an
            ordinary number.

    Example:
        >>> median_with_interval([2.0, 2.5, 3.0, 0.0, 2.2])
        SeedMedian(median=2.2, low=0.0, high=3.0, n=5, censored=1, undefined=0)
    """
    x = sorted(float(value) for value in values if not math.isnan(value))
    n, undefined = len(x), len(values) - len(x)
    if not n:
        return SeedMedian(math.nan, math.nan, math.nan, 0, 0, undefined)
    lower, upper, skipped = x[(n - 1) // 2], x[n // 2], _skipped(n)
    middle = lower if lower == upper or (zero_is_never and lower == 0) else (lower + upper) / 2
    return SeedMedian(middle, x[skipped], x[n - 1 - skipped], n, zero_is_never * x.count(0.0), undefined)


def _skipped(n: int) -> int:
    """Number of values below the interval, and above it."""
    most = (n - 1) // 2
    return max((k for k in range(1, most + 1) if _below(n, k) <= (1 - _COVERAGE) / 2), default=0)


def _below(n: int, skipped: int) -> float:
    """Probability that at most `skipped` of n values are below the median of their distribution."""
    return sum(math.comb(n, k) for k in range(skipped + 1)) / 2**n
