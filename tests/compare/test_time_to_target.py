"""When a target is reached, and at what cost."""

from __future__ import annotations

import pytest
from helpers.grid_runs import evaluation

from effopd.compare.time_to_target import Cost, final_target, first_reach, smooth, speedup_by_gap


def rows(values, seconds=1.0):
    return [evaluation(step, value, seconds=seconds * step) for step, value in enumerate(values)]


def test_a_planted_speedup_is_found_and_none_where_there_is_none():
    slow = rows([0.98**i for i in range(201)])
    fast = rows([0.98 ** (2 * i) for i in range(201)], seconds=1.5)
    reached = first_reach(fast, final_target(slow))
    assert Cost.of(slow[-1]).ratio(reached)["steps"] == pytest.approx(2.0, rel=0.03)
    assert Cost.of(slow[-1]).ratio(reached)["seconds"] == pytest.approx(2 / 1.5, rel=0.03)
    same = first_reach(slow, final_target(slow))
    assert Cost.of(slow[-1]).ratio(same) == {
        "steps": 1.0,
        "seconds": 1.0,
        "generated_tokens": 1.0,
        "forward_tokens": 1.0,
    }


def test_one_lucky_evaluation_is_not_enough():
    assert first_reach(rows([1, 1, 0.1, 1, 1]), 0.5) is None
    assert first_reach(rows([1, 1, 0.1, 0.2, 1]), 0.5).steps == 3


def test_never_reached_is_none():
    assert first_reach(rows([1.0, 0.9, 0.8]), 0.5) is None


def test_higher_can_be_better_and_step_0_never_counts():
    rising = rows([0.5, 0.6, 0.7, 0.8, 0.9])
    assert first_reach(rising, 0.7, higher_is_better=True).steps == 3
    assert first_reach(rising, 0.5, higher_is_better=True).steps == 1
    assert first_reach(rising, 0.95, higher_is_better=True) is None


def test_smoothing_is_a_trailing_median():
    assert smooth([5, 1, 3, 2, 100]) == [5, 3.0, 3, 2, 3]
    assert smooth([4.0]) == [4.0]


def test_speedup_by_gap_closed():
    slow, fast = rows([0.95**i for i in range(60)]), rows([0.95 ** (3 * i) for i in range(60)], seconds=1.5)
    table = speedup_by_gap(slow, fast, shares=(0.5, 0.9, 0.999))
    assert [row["gap_closed"] for row in table] == [0.5, 0.9, 0.999]
    assert table[1]["speedup"]["steps"] == pytest.approx(3.0, rel=0.15)
    assert table[1]["speedup"]["seconds"] == pytest.approx(2.0, rel=0.15)
    assert table[2]["speedup"] is None  # the slow run never closes 99.9 %
