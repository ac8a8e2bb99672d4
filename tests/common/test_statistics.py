"""Intervals: they cover, they repeat, and NaNs are left out and counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from effopd.common import statistics
from effopd.common.statistics import Interval, bootstrap_mean, paired_difference, student_t


def coverage(estimate, draw, mean: float, trials: int) -> float:
    found = [estimate(draw(np.random.default_rng(trial))) for trial in range(trials)]
    return float(np.mean([e.low <= mean <= e.high for e in found]))


def test_bootstrap_covers_at_about_95_percent():
    for draw, mean in ((lambda rng: rng.standard_normal(60), 0.0), (lambda rng: rng.exponential(size=60), 1.0)):
        assert 0.90 <= coverage(lambda x: bootstrap_mean(x, draws=400), draw, mean, 400) <= 0.98


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=40)
    ours = bootstrap_mean(values, draws=20_000)
    scipys = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert ours.mean == values.mean() and ours.n == 40
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.01)


def test_student_t_is_students_t_and_covers_with_three_seeds():
    values = [0.2, 0.5, 0.3]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    found = student_t(values)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 3))
    assert 0.92 <= coverage(student_t, lambda rng: rng.standard_normal(3), 0.0, 1000) <= 0.98


@pytest.mark.parametrize("estimate", [bootstrap_mean, student_t, lambda x: paired_difference(x, [0.0] * len(x))])
def test_nans_are_left_out_and_counted(estimate):
    assert estimate([1.0, math.nan, 2.0, 4.0]) == estimate([1.0, 2.0, 4.0])
    assert estimate([1.0, math.nan, 2.0, 4.0]).n == 3
    one, none = estimate([3.0, math.nan]), estimate([math.nan])
    assert (one.mean, one.n) == (3.0, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert none.n == 0 and math.isnan(none.mean) and math.isnan(none.low)
    assert estimate([]).n == 0


def test_the_interval_holds_the_mean_even_without_spread():
    for estimate in (bootstrap_mean, student_t):
        found = estimate([0.1] * 7)
        assert found.low <= found.mean <= found.high
        assert found.high - found.low < 1e-15


def test_deterministic_by_seed_and_whatever_the_chunks(monkeypatch):
    values = np.random.default_rng(0).standard_normal(31)
    found = bootstrap_mean(values, draws=101)
    assert bootstrap_mean(values, draws=101) == found != bootstrap_mean(values, draws=101, seed=1)
    monkeypatch.setattr(statistics, "_CHUNK", 64)
    assert bootstrap_mean(values, draws=101) == found


def test_inputs_of_all_kinds_are_the_same():
    values = [1.0, 2.0, 4.0]
    kinds = (tuple(values), np.array(values), torch.tensor(values), (v for v in values), dict.fromkeys(values, 0))
    assert {bootstrap_mean(kind) for kind in kinds} == {bootstrap_mean(values)}


def test_pairs_cancel_what_matrices_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 50)
    a, b = shared + 0.5 + rng.normal(0, 0.1, 50), shared + rng.normal(0, 0.1, 50)
    found = paired_difference(a, b)
    assert found.mean == pytest.approx((a - b).mean()) and found.n == 50
    assert 0.4 < found.low < 0.5 < found.high < 0.6
    b[3] = math.nan
    assert paired_difference(a, b).n == 49
    assert paired_difference(a, a) == Interval(0.0, 0.0, 0.0, 50)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 and 3 values"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="draws"):
        bootstrap_mean([1.0, 2.0], draws=0)
    assert str(Interval(0.5, 0.25, 0.75, 3)) == "0.5 [0.25, 0.75]"
