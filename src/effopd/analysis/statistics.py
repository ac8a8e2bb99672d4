"""Means with 95 % intervals: over matrices (bootstrap), over seeds (Student's t), and of paired differences.

An interval over the matrices of one run says how far the mean depends on which matrices the model happens to have. It is
no statement about another training run: that takes seeds. Matrices of one model are not independent either, so read it
as a description rather than as a test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Resampled values held at a time.
_CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean, its two-sided 95 % interval, and the number of values behind it (NaNs not counted).

    `low` and `high` are NaN when one value, or none, cannot say how sure the mean is.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(values: Iterable[float], draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean with the percentile bootstrap interval: the 2.5 % and 97.5 % quantiles of means of resampled values.

    NaNs are left out; `n` says how many values remain. With few values the interval is too narrow: it covers the
    mean of normal values in 91 % of cases with ten of them, 83 % with five, 75 % with three.

    Args:
        values: numbers, an array, or a CPU tensor; flattened.
        draws: resamples. The same `seed` and values give the same interval.

    Raises:
        ValueError: draws < 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    kept = _numbers(values)
    kept = kept[~np.isnan(kept)]
    n = len(kept)
    mean = float(kept.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    means = np.concatenate(
        [kept[rng.integers(n, size=(min(rows, draws - i), n))].mean(axis=1) for i in range(0, draws, rows)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    # resampled means of equal values differ from their mean by rounding
    return Estimate(mean, min(float(low), mean), max(float(high), mean), n)


def seed_mean(values: Iterable[float]) -> Estimate:
    """Mean over training seeds with Student's t interval: mean ± t₀.₉₇₅(n − 1) · sd / √n. NaNs are left out."""
    from scipy import stats

    kept = _numbers(values)
    kept = kept[~np.isnan(kept)]
    n = len(kept)
    mean = float(kept.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf(0.975, n - 1) * kept.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(a: Iterable[float], b: Iterable[float], draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of a − b over the same matrices, with the bootstrap interval over pairs.

    What the matrices have in common (size, depth) cancels, so it is much sharper than comparing two intervals. A pair
    with a NaN on either side is left out.

    Raises:
        ValueError: a and b do not have the same length.
    """
    first, second = _numbers(a), _numbers(b)
    if len(first) != len(second):
        raise ValueError(
            f"paired_difference needs the same matrices on both sides, got {len(first)} and {len(second)} values."
        )
    return bootstrap_mean(first - second, draws, seed)


def _numbers(values: Iterable[float]) -> NDArray[np.float64]:
    if not hasattr(values, "__array__"):
        values = list(values)
    return np.asarray(values, dtype=np.float64).ravel()
