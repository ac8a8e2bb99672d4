"""The grid: what it holds, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from effopd.compare.grid import folder_name, load_grid, merge
from effopd.compare.roles import Claim, Roles
from effopd.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
PLAN = {
    "output_dir": "runs/x",
    "reference_learning_rate": 3.0e-5,
    "tasks": ["testbed:chain_sum", "testbed:spell_backward"],
    "seeds": [0, 1],
    "base": {"max_steps": 4, "effopd": {"validation_size": 8}},
    "strategies": {
        "plain": {"learning_rate_factors": [0.33333, 1, 3]},
        "effopd": {"effopd": {"strategy": "effopd"}},
    },
}


def load(tmp_path, **changes):
    values = {key: value for key, value in (PLAN | changes).items() if value is not None}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    return load_grid(tmp_path / "plan.yaml")


def test_the_grid_is_complete_without_repeats_and_seeds_come_first(tmp_path):
    runs = load(tmp_path).runs()
    assert len(runs) == 2 * 2 * 4 == len({run.path for run in runs})
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for run in runs:
        assert run.settings["seed"] == run.settings["task_seed"] == run.settings["effopd"]["seed"] == run.seed
        assert run.settings["task"] == run.task and run.settings["output_dir"] == str(run.path)
        assert "learning_rate_factors" not in run.settings
    rates = {run.learning_rate for run in runs if run.strategy == "plain"}
    assert rates == {1e-5, 3e-5, 9e-5}
    own = next(run for run in runs if run.strategy == "effopd")
    assert own.settings["effopd"] == {"validation_size": 8, "strategy": "effopd", "seed": own.seed}


def test_settings_of_a_task_go_between_the_base_and_the_strategy(tmp_path):
    tasks = {"testbed:chain_sum": {"max_steps": 8, "effopd": {"gate": "better"}}, "testbed:spell_backward": None}
    runs = load(tmp_path, tasks=tasks, strategies={"plain": {}, "effopd": {"effopd": {"gate": "not_worse"}}}).runs()
    assert [run.task for run in runs[:2]] == ["testbed:chain_sum"] * 2 and len(runs) == 2 * 2 * 2
    chain = {run.strategy: run.settings for run in runs if run.task == "testbed:chain_sum"}
    assert chain["plain"]["max_steps"] == 8 and chain["plain"]["effopd"]["validation_size"] == 8
    assert (chain["plain"]["effopd"]["gate"], chain["effopd"]["effopd"]["gate"]) == ("better", "not_worse")
    assert {run.settings["max_steps"] for run in runs if run.task == "testbed:spell_backward"} == {4}


def test_roles_come_from_the_plan_and_are_no_settings_of_a_run(tmp_path):
    strategies = PLAN["strategies"] | {"effopd-strict": {"variant_of": "effopd", "effopd": {"gate": "strict"}}}
    claims = [{"strategy": "effopd", "speedup": 3}]
    grid = load(tmp_path, strategies=strategies, rivals=["effopd"], claims=claims)
    assert grid.roles == Roles(
        "plain", 3e-5, rivals=("effopd",), claims=(Claim("effopd", 3),), variants={"effopd-strict": "effopd"}
    )
    assert Roles.of_settings(grid.roles.to_settings()) == grid.roles
    assert all("variant_of" not in run.settings for run in grid.runs())


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("compare-*.yaml")), ids=lambda path: path.stem)
def test_every_variant_of_a_recipe_is_declared(recipe):
    """A name with another strategy's before a hyphen is one of its variants, of the baseline's, or
    a control.
    """
    grid = load_grid(recipe)
    for name in grid.strategies:
        prefix = name.rpartition("-")[0]
        if prefix in grid.strategies and prefix != grid.baseline and name not in grid.roles.controls:
            assert grid.roles.variants.get(name) == prefix


def test_runs_do_not_share_settings(tmp_path):
    runs = load(tmp_path).runs()
    runs[0].settings["effopd"]["strategy"] = "changed"
    assert all(run.settings["effopd"].get("strategy") != "changed" for run in runs[1:])


def test_task_and_seed_in_a_text_are_those_of_the_run(tmp_path):
    rollouts = {
        "rollouts": "cache/{task}/seed-{seed}",
        "args": {"file": "{seed}.json", "size": 4, "all": ["{seed}", 5]},
    }
    grid = load(tmp_path, strategies={"plain": {}, "offline": rollouts})
    found = {(run.task, run.seed): run.settings for run in grid.runs() if run.strategy == "offline"}
    assert found["testbed:chain_sum", 1]["rollouts"] == "cache/testbed-chain_sum/seed-1"
    assert found["testbed:spell_backward", 0]["args"] == {"file": "0.json", "size": 4, "all": ["0", 5]}


def test_overrides_win(tmp_path):
    load(tmp_path)
    assert load_grid(tmp_path / "plan.yaml", workers=3, output_dir=None).workers == 3


def test_blocks_merge_key_by_key():
    assert merge({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 2}) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 2}


def test_folder_names_are_plain():
    assert folder_name("math:data/train set.jsonl") == "math-data-train-set.jsonl"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_dir": None}, "missing: output_dir"),
        ({"sedes": [1]}, "unknown: sedes"),
        ({"seeds": []}, "'seeds' must not be empty"),
        ({"seeds": [1, 1]}, "contain duplicates"),
        ({"seeds": 5}, "must be a list"),
        ({"strategies": {"plain": {}, False: {}}}, "'strategies' has a name that YAML reads as False"),
        ({"tasks": [7]}, "'tasks' has a name that YAML reads as 7"),
        ({"baselines": [["plain"]]}, r"'baselines' has a name that YAML reads as \['plain'\]"),
        ({"strategies": {"plain": {}, "../x": {}}}, "strategy '../x': expected a name of a folder"),
        ({"seeds": [[0, 1]]}, r"'seeds' has \[0, 1\]: expected whole numbers"),
        ({"seeds": [0, True]}, "'seeds' has True"),
        ({"seeds": [-1]}, "'seeds' has -1"),
        ({"seeds": ["a"]}, "'seeds' has 'a'"),
        ({"strategies": {"plain": {"learning_rate_factors": [1, float("inf")]}}}, "list of positive numbers"),
        ({"reference_learning_rate": "3e-5"}, "write 3.0e-5"),
        ({"baseline": "other"}, "not one of the strategies"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 2, "devices": ["0"]}, "1 devices"),
        ({"base": {"seed": 3}}, "'base' sets seed"),
        ({"strategies": {"plain": {"learning_rate": 1.0}}}, "'plain' sets learning_rate"),
        ({"strategies": {"plain": {"learning_rate_factors": [3]}}}, "needs factor 1"),
        ({"strategies": {"plain": {"learning_rate_factors": "all"}}}, "list of positive numbers"),
        ({"rivals": ["efopd"]}, "rivals names 'efopd'"),
        ({"headline": "effopd"}, "'headline' must be a list"),
        ({"controls": ["noop"]}, "controls names 'noop'"),
        ({"claims": [{"strategy": "paper", "speedup": 3}]}, "claims names 'paper'"),
        ({"claims": [{"strategy": "effopd", "speed": 3}]}, "a claim has the fields strategy, speedup"),
        ({"claims": [{"strategy": "effopd", "speedup": 3, "axis": "hours"}]}, "one of steps"),
        ({"claims": ["3x"]}, "a claim has the fields strategy, speedup"),
        ({"strategies": {"plain": {}, "short": {"variant_of": "long"}}}, "variant_of names 'long'"),
        ({"strategies": {"plain": {}, "short": {"variant_of": "short"}}}, "a variant of itself"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


def test_no_plan_and_no_mapping(tmp_path):
    with pytest.raises(ConfigError, match="no plan"):
        load_grid(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="mapping"):
        load_grid(tmp_path / "list.yaml")


def test_a_name_occurs_once(tmp_path):
    (tmp_path / "plan.yaml").write_text("strategies:\n  plain: {}\n  plain: {lr_scheduler_type: linear}\n")
    with pytest.raises(ConfigError, match=r"plan\.yaml: plain is set twice, in lines 2 and 3"):
        load_grid(tmp_path / "plan.yaml")


def test_several_baselines_are_named_and_the_first_sets_the_targets(tmp_path):
    def load(**fields):
        path = tmp_path / "plan.yaml"
        plan = {
            "output_dir": "x", "reference_learning_rate": 1e-4, "tasks": ["t"], "seeds": [0], "base": {},
            "strategies": {"plain": {}, "topd": {}, "mine": {}},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(plan | fields))
        return load_grid(path).roles

    assert load().rivals_to_beat == load(baseline="plain").rivals_to_beat == ("plain",)
    assert load(baselines=["topd", "plain"]).baseline == "topd"
    assert load(baseline="plain", baselines=["topd", "plain"]).rivals_to_beat == ("topd", "plain")
    for wrong in (["topd", "topd"], ["nobody"], "topd"):
        with pytest.raises(ConfigError, match="baseline"):
            load(baselines=wrong)
    with pytest.raises(ConfigError, match=r"baselines=.*one of them the baseline 'plain'"):
        load(baseline="plain", baselines=["topd"])
