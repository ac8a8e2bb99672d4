"""Speed-up over the baseline tuned on the other seeds, by target."""

from __future__ import annotations

import math

import pytest
from helpers.grid_runs import LR
from helpers.grid_runs import planted_run as run

from effopd.compare.envelope import SHARES, Envelope

SEEDS = range(3)


def test_the_opponent_is_the_fastest_arm_of_all_baselines_on_the_other_seeds():
    runs = [run("plain", rate, seed, speed, noise=0.0) for seed in SEEDS for rate, speed in ((LR, 1.0), (3 * LR, 2.0))]
    runs += [run("decay", LR, seed, 3.0, noise=0.0) for seed in SEEDS]
    for share in SHARES:
        assert Envelope(runs).opponent(0, share) == ("plain", 3 * LR)
        assert Envelope(runs, ("plain", "decay")).opponent(0, share) == ("decay", LR)


def test_a_lucky_seed_does_not_choose_its_own_opponent():
    speed = {(LR, seed): 2.0 for seed in SEEDS} | {(3 * LR, seed): 1.0 for seed in SEEDS} | {(3 * LR, 0): 8.0}
    runs = [run("plain", rate, seed, s, noise=0.0) for (rate, seed), s in speed.items()]
    assert Envelope(runs).opponent(0, 0.1) == ("plain", LR)  # at seed 0 itself the other rate is faster


def test_the_tuned_arm_is_1x_and_twice_its_speed_is_2x_on_every_axis_at_every_target():
    runs = [run("plain", rate, seed, speed, noise=0.0) for seed in SEEDS for rate, speed in ((LR, 1.0), (3 * LR, 2.0))]
    runs += [run("ours", LR, seed, 4.0, noise=0.0) for seed in SEEDS]
    for axis in ("steps", "seconds", "generated_tokens", "forward_tokens"):
        for share in (0.25, 0.1):
            envelope = Envelope(runs, axis=axis)
            assert envelope.speedup(("plain", 3 * LR), share).median == 1.0
            assert envelope.speedup(("ours", LR), share).median == pytest.approx(2.0, rel=0.15)


def test_never_is_zero_over_an_opponent_that_arrives_and_infinite_the_other_way():
    runs = [run("plain", LR, seed, noise=0.0) for seed in SEEDS]
    runs += [run("stuck", LR, seed, 3.0, floor=0.5, noise=0.0) for seed in SEEDS]
    assert Envelope(runs).speedup(("stuck", LR), 0.1).median == 0.0
    assert Envelope(runs, ("stuck",)).speedup(("plain", LR), 0.1).median == math.inf


def test_one_seed_alone_tunes_on_itself():
    runs = [run("plain", LR, 0), run("plain", 3 * LR, 0, speed=2.0)]
    assert Envelope(runs).opponent(0, 0.25) == ("plain", 3 * LR)
