"""Intervals that cover, order that keeps the runs that never arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from effopd.compare.paired import SeedMedian, coverage, median_with_interval, ratio


def test_ratios_keep_their_order_when_someone_never_arrives():
    assert ratio(10.0, 5.0) == 2.0
    assert ratio(10.0, None) == 0.0
    assert ratio(None, 5.0) == math.inf
    assert math.isnan(ratio(None, None))


@pytest.mark.parametrize("baseline, cost", [(0, 5), (5, 0), (0, 0), (0.0, 5.0)])
def test_a_cost_of_0_is_no_speed_up_and_not_never(baseline, cost):
    """As the sampled tokens of runs on stored answers."""
    assert math.isnan(ratio(baseline, cost))
    found = median_with_interval([ratio(baseline, cost), 2.0])
    assert (found.median, found.n, found.censored, found.undefined) == (2.0, 1, 0, 1)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 8, 9, 10, 20])
def test_intervals_cover_the_true_median(n):
    rng = np.random.default_rng(n)
    truth, covered, trials = 2.0, 0, 2000
    for _ in range(trials):
        estimate = median_with_interval(list(truth * np.exp(0.3 * rng.standard_normal(n))))
        assert estimate.low <= estimate.median <= estimate.high
        covered += estimate.low <= truth <= estimate.high
    assert covered / trials == pytest.approx(coverage(n), abs=0.02)
    assert coverage(n) >= 0.95 or n <= 5


@pytest.mark.parametrize("n, cut", [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (20, 5)])
def test_the_interval_leaves_out_as_many_values_as_95_percent_allow(n, cut):
    found = median_with_interval([float(value) for value in range(n)])
    assert (found.low, found.high) == (cut, n - 1 - cut)
    assert 1 - 2 * binom.cdf(cut, n, 0.5) == pytest.approx(coverage(n))
    assert 1 - 2 * binom.cdf(cut + 1, n, 0.5) < 0.95


def test_five_seeds_give_their_range():
    values = [1.5, 1.9, 2.0, 2.4, 7.0]
    assert median_with_interval(values) == SeedMedian(2.0, 1.5, 7.0, 5)


@pytest.mark.parametrize("truth, found", [(2.0, True), (1.0, False)])
def test_a_planted_speedup_is_found_and_none_is_not(truth, found):
    """Ten paired seeds that share a seed effect of their own."""
    rng = np.random.default_rng(0)
    calls = 0
    for _ in range(200):
        shared = np.exp(0.5 * rng.standard_normal(10))
        baseline = 90 * shared * np.exp(0.1 * rng.standard_normal(10))
        own = 90 / truth * shared * np.exp(0.1 * rng.standard_normal(10))
        estimate = median_with_interval([ratio(b, o) for b, o in zip(baseline, own, strict=True)])
        calls += not estimate.low <= 1.0 <= estimate.high
    assert calls == 200 if found else calls / 200 < 0.1


def test_never_is_not_dropped():
    with_all = median_with_interval([2.0, 2.2, 2.4, 2.6, 2.8])
    with_never = median_with_interval([2.0, 2.2, 2.4, 2.6, 0.0])
    assert with_never.median < with_all.median and with_never.low == 0.0 and with_never.censored == 1
    mostly = median_with_interval([0.0, 0.0, 0.0, 2.6, 2.8])
    assert mostly.median == 0.0 and mostly.high > 0


def test_a_baseline_that_never_arrives_counts_as_beaten():
    estimate = median_with_interval([2.0, 3.0, math.inf, math.inf, math.inf])
    assert estimate.median == math.inf and estimate.low == 2.0
    row = estimate.to_row()
    assert row["median"] is None and row["n"] == 5


def test_pairs_without_information_are_counted():
    estimate = median_with_interval([math.nan, 2.0, 3.0])
    assert (estimate.n, estimate.undefined) == (2, 1) and estimate.median == 2.5
    nothing = median_with_interval([math.nan])
    assert nothing.n == 0 and nothing.to_row()["median"] is None


def test_the_middle_of_never_and_something_is_never():
    assert median_with_interval([0.0, 4.0]).median == 0.0
    assert median_with_interval([2.0, math.inf]).median == math.inf


def test_differences_know_no_never():
    estimate = median_with_interval([-1.0, 0.0, 0.0, 1.0, 3.0, 4.0], zero_is_never=False)
    assert estimate.median == 0.5 and estimate.censored == 0
    flipped = median_with_interval([1.0, 0.0, 0.0, -1.0, -3.0, -4.0], zero_is_never=False)
    assert flipped.median == -0.5
