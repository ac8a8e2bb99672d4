"""Targets from outside a grid's reference: the baseline's end at every rate, and another grid's
target.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from helpers.grid_runs import LR
from helpers.grid_runs import planted_run as run

from effopd.compare.cross_targets import across, own_rate, runs_of
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles
from effopd.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


def steps(rows, strategy, rate=LR, task="t", axis="steps"):
    (row,) = [
        r for r in rows if (r["task"], r["strategy"], r["learning_rate"], r["axis"]) == (task, strategy, rate, axis)
    ]
    return row


def test_twice_as_fast_at_the_same_rate_is_2x_at_each_rate_and_not_only_at_the_reference():
    runs = [
        run(strategy, rate, seed, speed * tuned, noise=0.0)
        for seed in range(5)
        for strategy, speed in (("plain", 1.0), ("twice", 2.0))
        for rate, tuned in ((LR, 1.0), (3 * LR, 3.0))
    ]
    for rate in (LR, 3 * LR):
        row = steps(own_rate(runs, "plain"), "twice", rate)
        assert row["median"] == pytest.approx(2.0, rel=0.06) and row["reached"] == row["n"] == 5
        assert steps(own_rate(runs, "plain"), "plain", rate)["median"] == 1.0


def test_never_counts_and_rates_without_a_baseline_are_left_out():
    runs = [run(seed=seed) for seed in range(3)]
    runs += [run("stuck", seed=seed, speed=3.0, floor=0.5) for seed in range(3)] + [run("alone", 9 * LR)]
    rows = own_rate(runs, "plain")
    assert steps(rows, "stuck")["median"] == 0.0 and steps(rows, "stuck")["reached"] == 0
    assert not [row for row in rows if row["strategy"] == "alone"]


def test_a_baseline_that_diverged_sets_no_target():
    plain = [run(seed=seed, noise=0.0) for seed in range(3)]
    runs = [plain[0].diverged(), *plain[1:], *(run("stuck", seed=seed, floor=0.5, noise=0.0) for seed in range(3))]
    rows = own_rate(runs, "plain")
    assert steps(rows, "stuck")["reached"] == 0 and steps(rows, "stuck")["n"] == 2
    assert steps(rows, "plain")["reached"] == steps(rows, "plain")["n"] == 2
    assert steps(across(runs, ("plain", LR), ("stuck", LR), runs), "plain")["n"] == 2
    assert own_rate([each.diverged() for each in runs], "plain") == []


def test_another_grid_is_asked_for_the_target_of_this_one():
    home = [run(seed=seed, noise=0.0) for seed in range(3)] + [
        run("ours", seed=seed, speed=2.0, noise=0.0) for seed in range(3)
    ]
    other = [run("plain", 3 * LR, seed, speed=4.0, step_cost=0.25, noise=0.0) for seed in (0, 1, 7)]
    rows = across(home, ("plain", LR), ("ours", LR), other)
    row = steps(rows, "plain", 3 * LR)
    assert row["n"] == 2 and row["median"] == pytest.approx(2.0, rel=0.1) and row["last_steps"] == 96
    assert steps(rows, "plain", 3 * LR, axis="seconds")["median"] == pytest.approx(8.0, rel=0.1)
    assert across(home, ("plain", LR), ("ours", LR), other, [("ours", LR)]) == []


def test_grids_on_other_prompts_are_refused():
    home = [run(seed=0, noise=0.0)]
    (other,) = home
    moved = dataclasses.replace(
        other, evaluations=tuple(dataclasses.replace(e, kl=1.01 * e.kl) for e in other.evaluations)
    )
    with pytest.raises(ConfigError, match="expected the same"):
        across(home, ("plain", LR), ("plain", LR), [moved])


def test_the_reference_rows_are_those_of_the_grids_own_analysis():
    """On the published runs: at the reference learning rate both ways of asking give the same
    speed-ups.
    """
    published = json.loads((DOCS / "results.json").read_text())
    theirs = {
        (r["task"], r["strategy"], r["axis"]): r["median"]
        for r in published["speedups"]
        if r["learning_rate"] == r["against_learning_rate"] == LR
        and r["against"] == "plain"
        and r["target"] == "reference_kl"
    }
    ours = [r for r in own_rate(runs_of(published), "plain") if r["learning_rate"] == LR]
    assert len(ours) > 80
    for row in ours:
        if math.isfinite(row["median"] or math.inf):
            assert row["median"] == pytest.approx(theirs[row["task"], row["strategy"], row["axis"]])


def test_round_trip():
    runs = [run(seed=0), run("ours", seed=0)]
    assert [r.arm for r in runs_of(analyze_runs(runs, Roles("plain", LR)))] == [r.arm for r in runs]
