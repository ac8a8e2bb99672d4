"""Blocks of docs/neighbours.md from planted runs."""

from __future__ import annotations

import dataclasses
import math

import neighbour_runs
import neighbours
import pages
import pytest
from helpers.grid_runs import planted_run

from effopd.compare.grid import load_grid
from effopd.compare.grid_run import to_row
from effopd.compare.paired import SeedMedian

ARMS = {"plain": 1.0, "newton_search": 2.0, "teacher_top_k": 1.0, "teacher_top_k+newton": 1.5, "esr": 0.1}


def results(seeds=3):
    runs = [
        planted_run(strategy, rate, seed, factor * speed, task=f"testbed:{task}", noise=0.0)
        for task in ("a", "b") for seed in range(seeds) for strategy, speed in ARMS.items()
        for rate, factor in ((1e-5, 0.5), (3e-5, 1.0))
    ]  # fmt: skip
    return {"settings": {"planned_runs": 100}, "runs": [to_row(run) for run in runs]}


def test_every_block_has_its_place_and_the_right_values():
    page = neighbours.Page(results())
    blocks = page.blocks()
    pages.with_blocks((pages.DOCS / "neighbours.md").read_text(), blocks)
    costs = [line for line in blocks["costs"].splitlines() if line.startswith("| a ") and "| 10% |" in line]
    assert len(costs) == 4  # plain OPD is the opponent
    plain_newton, top_k, top_k_newton, esr = costs
    assert "full reverse KL | newton_search" in plain_newton and "| yes |" in plain_newton
    assert "Revisiting OPD |  | 10% | 1.00×" in top_k and "no difference shown" in top_k
    assert "Revisiting OPD | newton_search" in top_k_newton and "| yes |" in top_k_newton
    assert "does not reach the target" in esr
    assert blocks["final"].count("3.0e-05 | 3 |") == 2 * len(ARMS)
    assert "60 of 100 planned runs exist: 20 combinations" in blocks["coverage"]
    assert "20 with 3 seeds." in blocks["coverage"]
    rates = next(line for line in blocks["rates"].splitlines() if line.startswith("| b | ESR"))
    assert blocks["rates"].splitlines()[0].endswith("1.0e-05 | 3.0e-05 |") and rates.count(" 0.") == 2
    verdicts = blocks["verdicts"].splitlines()
    assert len(verdicts) == 2 + len(ARMS) - 1
    assert verdicts[2].startswith("| full reverse KL + newton_search | 1.88×") and "| yes |" in verdicts[2]
    assert "| vOPD |" in blocks["methods"] and blocks["methods"].count("none yet") == len(neighbours.METHODS) - 3


def test_a_rate_with_one_lucky_seed_is_not_the_best():
    three = [planted_run("plain", 3e-5, seed, 1.0, task="testbed:a", noise=0.0) for seed in range(3)]
    lucky = planted_run("plain", 9e-5, 0, 3.0, task="testbed:a", noise=0.0)
    page = neighbours.Page({"settings": {}, "runs": [to_row(run) for run in (*three, lucky)]})
    assert page.best("testbed:a", "plain") == page.best("testbed:a", "plain", 0.1) == ("plain", 3e-5)


def test_seconds_of_a_slowed_run_are_scaled_by_its_pace_of_evaluation():
    def run(seed, slow):
        made = planted_run(seed=seed, noise=0.0)
        costs = [
            dataclasses.replace(e.costs, net_seconds=slow * e.costs.net_seconds, eval_seconds=slow * (k + 1),
                                eval_generated_tokens=100 * (k + 1))
            for k, e in enumerate(made.evaluations)
        ]  # fmt: skip
        pairs = zip(made.evaluations, costs, strict=True)
        return dataclasses.replace(made, evaluations=tuple(dataclasses.replace(e, costs=c) for e, c in pairs))

    even = neighbour_runs.even_clock([run(0, 1.0), run(1, 1.5), run(2, 1.0)])
    assert [each.evaluations[-1].costs.net_seconds for each in even] == pytest.approx([96.0] * 3)


@pytest.mark.parametrize(("seconds", "tokens", "text"), [
    ((2.0, 1.5, 2.5, 3), (1.0, 1.0, 1.0, 3), "yes"),
    ((1.4, 0.9, 2.0, 3), (1.0, 1.0, 1.0, 3), "no difference shown"),
    ((0.8, 0.7, 0.9, 3), (3.0, 2.0, 4.0, 3), "for sampled tokens only"),
    ((0.8, 0.7, 0.9, 3), (3.0, 1.0, 4.0, 3), "no"),
    ((1.4, 1.4, 1.4, 1), (1.0, 1.0, 1.0, 1), "yes (few seeds)"),
    ((0.8, 0.8, 0.8, 1), (1.0, 1.0, 1.0, 1), "no (few seeds)"),
    ((0.0, 0.0, 0.0, 3), (0.0, 0.0, 0.0, 3), "no: does not reach the target"),
    ((math.nan, math.nan, math.nan, 0), (math.nan, math.nan, math.nan, 0), "neither reaches the target (few seeds)"),
])  # fmt: skip
def test_verdicts(seconds, tokens, text):
    one = SeedMedian(1.0, 1.0, 1.0, seconds[3])
    assert neighbours.verdict([SeedMedian(*seconds), SeedMedian(*tokens), one, one]) == text


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "PLACE", tmp_path)
    neighbours.Page(results(1)).draw()
    assert (tmp_path / "costs.png").stat().st_size > 20_000


def test_every_arm_of_the_plan_is_on_the_page():
    grid = load_grid(neighbour_runs.RECIPE)
    assert {name for method in neighbours.METHODS for name in neighbours._pair(method.arm)} >= set(grid.strategies)
    assert {method.arm for method in neighbours.METHODS} <= {*grid.strategies, neighbour_runs.DGRPO}
    order = list(grid.strategies)
    first_ahead = order.index("newton_search")
    assert not any(grid.strategies[name].get("effopd") for name in order[:first_ahead])
    assert all(grid.strategies[name].get("effopd") for name in order[first_ahead:])
    assert all(len(grid.factors(name)) >= 3 for name in order) and len(grid.seeds) == 3 and len(grid.tasks) == 2
    paths = [s[k] for s in grid.strategies.values() for k in ("rollouts", "traces") if k in s]
    paths.append(grid.strategies["clpd"]["curriculum_teachers"][0])
    assert {path.split("/{task}")[0] for path in paths} == {str(neighbour_runs.TRACES)} and len(paths) == 4
    clpd = next(run for run in grid.runs() if run.strategy == "clpd")
    assert clpd.settings["curriculum_teachers"][0] == f"{neighbour_runs.TRACES}/testbed-chain_sum/weak-teacher"


def test_runs_with_rewards_take_the_places_and_the_step_of_the_plan():
    grid = load_grid(neighbour_runs.RECIPE)
    runs = neighbour_runs.reward_runs(grid)
    assert len(runs) == len(grid.tasks) * len(grid.seeds) * 3 and len({run.path for run in runs}) == len(runs)
    answers = {run.settings["per_device_train_batch_size"] for run in runs}
    assert answers == {grid.base["per_device_train_batch_size"]}
    assert all(run.settings["output_dir"] == str(run.path) and "/dgrpo/" in str(run.path) for run in runs)
