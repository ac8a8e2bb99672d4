"""The fastest baseline in hindsight, and early targets from a grid with more evaluations."""

from __future__ import annotations

import math

import pytest
from helpers.grid_runs import LR, planted_run
from rivals import Hindsight

from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles

ROLES = Roles("plain", LR, baselines=("plain", "tuned"))
TASK, OWN = "sums", ("look-ahead", LR)


def grid(every, arms=("plain", "tuned", "look-ahead"), speeds=(1.0, 2.0, 3.0), seeds=2, rate=LR):
    runs = [
        planted_run(arm, rate, seed, speed, task=TASK, noise=0.0, pace=lambda seed: 0.03, steps=range(0, 241, every))
        for arm, speed in zip(arms, speeds, strict=True) for seed in range(seeds)
    ]  # fmt: skip
    return {**analyze_runs(runs, ROLES), "settings": ROLES.to_settings()}


def steps(curve):
    return curve["step"]


def test_the_fastest_baseline_is_chosen_for_each_target():
    known = Hindsight(grid(1), steps)
    cost, arm = known.best(TASK, 0.5)
    assert arm == ("tuned", LR) and known.cost(TASK, arm, 0.5) == cost
    assert cost == pytest.approx(math.log(2) / 0.06, abs=2.1)  # the trailing median finds it a step late
    assert known.lead(TASK, OWN, 0.5) == cost / known.cost(TASK, OWN, 0.5) > 1
    assert known.ratios(TASK, "look-ahead", 0.5) == f"{known.lead(TASK, OWN, 0.5):.2f}×"


def test_early_targets_come_from_the_grid_with_more_evaluations_and_late_ones_do_not():
    coarse, fine = grid(16), grid(1)
    alone, exact, both = Hindsight(coarse, steps), Hindsight(fine, steps), Hindsight(coarse, steps, early=fine)
    for share in (0.5, 0.25):
        assert both.lead(TASK, OWN, share) == exact.lead(TASK, OWN, share) != alone.lead(TASK, OWN, share)
        assert both.best(TASK, share) == exact.best(TASK, share)
    assert both.lead(TASK, OWN, 0.05) == alone.lead(TASK, OWN, 0.05)


def test_two_arms_are_compared_in_the_same_grid():
    """Otherwise the one with fewer evaluations would seem slower than it is."""
    coarse = grid(16, ("plain", "tuned", "look-ahead"), (1.0, 3.0, 3.0))
    both = Hindsight(coarse, steps, early=grid(1, ("plain", "look-ahead"), (1.0, 3.0)))
    assert both.ratio(TASK, ("tuned", LR), OWN, 0.5) == 1
    other = Hindsight(coarse, steps, early=grid(1, ("plain", "tuned"), (1.0, 3.0)))
    assert other.lead(TASK, OWN, 0.5) == 1


def test_an_arm_of_the_early_grid_alone_competes_for_early_targets_only():
    names = ("plain", "tuned", "look-ahead")
    both = Hindsight(grid(16, names[::2], (1.0, 3.0)), steps, early=grid(1, names, (1.0, 2.0, 3.0)))
    assert both.best(TASK, 0.25)[1] == ("tuned", LR) and both.best(TASK, 0.05)[1] == ("plain", LR)
    assert both.lead(TASK, OWN, 0.25) < 2 == both.lead(TASK, OWN, 0.05)


def test_an_arm_needs_two_seeds_to_compete():
    one = Hindsight(grid(1, ("tuned", "look-ahead"), (2.0, 3.0), seeds=1), steps)
    assert one.competing(TASK) == [] and math.isnan(one.lead(TASK, OWN, 0.5))


@pytest.mark.parametrize(("speeds", "lead", "cell"), [
    ((0.1, 3.0), math.inf, "> any"), ((3.0, 0.1), 0.0, "0×"), ((0.1, 0.1), math.nan, "–"),
])  # fmt: skip
def test_who_does_not_arrive(speeds, lead, cell):
    known = Hindsight(grid(1, ("plain", "look-ahead"), speeds), steps)
    assert known.lead(TASK, OWN, 0.05) == pytest.approx(lead, nan_ok=True)
    assert known.ratios(TASK, "look-ahead", 0.05) == cell
