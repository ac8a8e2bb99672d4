"""Strategies that compete are evaluated at the same steps, or a remark names them."""

from __future__ import annotations

import pytest
import yaml
from compare.test_grid import PLAN, RECIPES

from effopd.compare.grid import load_grid
from effopd.compare.uneven_evaluations import uneven_evaluations

BASE = {"eval_strategy": "steps", "eval_steps": 8, "per_device_train_batch_size": 16}


def remarks(tmp_path, **strategies):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({**PLAN, "base": BASE, "strategies": strategies}, sort_keys=False))
    return uneven_evaluations(load_grid(plan))


@pytest.mark.parametrize("own", [{"eval_steps": 4}, {"eval_log_spacing": True}, {"eval_strategy": "epoch"}])
def test_strategies_with_other_evaluations_are_named(tmp_path, own):
    (remark,) = remarks(tmp_path, plain={}, rarely={}, often=own)
    spacing = {"eval_steps": "every 4 steps", "eval_log_spacing": "every 8 steps at most, log-spaced"}
    assert f"plain, rarely every 8 steps; often {spacing.get(*own, 'once per epoch')}" in remark
    assert "same eval_steps" in remark


@pytest.mark.parametrize(
    "own",
    [
        {"eval_steps": 8},
        {"learning_rate_factors": [1, 3]},
        {"eval_steps": 4, "per_device_train_batch_size": 32},
        {"eval_steps": 4, "updates_per_rollouts": 2},
        {"eval_steps": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_equal_evaluations_and_steps_of_another_size_need_no_remark(tmp_path, own):
    assert remarks(tmp_path, plain={}, other=own) == []


def test_settings_of_a_task_count(tmp_path):
    """They go between the base and the strategy, so a strategy can differ on one task only."""
    tasks = {"testbed:chain_sum": {"eval_steps": 4}, "testbed:spell_backward": None}
    plan = {**PLAN, "base": BASE, "tasks": tasks, "strategies": {"plain": {}, "rarely": {"eval_steps": 8}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    (remark,) = uneven_evaluations(load_grid(tmp_path / "plan.yaml"))
    assert "plain every 4 steps; rarely every 8 steps" in remark


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("compare-*.yaml")))
def test_the_shipped_plans_need_none(recipe):
    assert uneven_evaluations(load_grid(RECIPES / recipe)) == []
