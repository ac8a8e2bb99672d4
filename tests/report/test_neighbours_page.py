"""Blocks of docs/neighbours.md from planted runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import neighbour_runs
import neighbours
import pages
import pytest
from helpers.grid_runs import LR, planted_run

from effopd.compare.grid import Grid, load_grid
from effopd.compare.grid_run import from_row, to_row
from effopd.compare.imported_runs import key, read_entries, save_entries, scaled, sources
from effopd.compare.paired import SeedMedian

ARMS = {"plain": 1.0, "newton_search": 2.0, "teacher_top_k": 1.0, "teacher_top_k+newton": 1.5, "esr": 0.1}
PLANS = [neighbours.RECIPES / f"{part.plan}.yaml" for part in neighbours.PARTS]


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


def slowed(slow, *arguments, **more):
    """A planted run as read from its folder, on a machine that other processes slowed down."""
    made = planted_run(*arguments, noise=0.0, **more)
    costs = [
        dataclasses.replace(e.costs, net_seconds=slow * e.costs.net_seconds, eval_seconds=slow * (k + 1),
                            eval_generated_tokens=100 * (k + 1))
        for k, e in enumerate(made.evaluations)
    ]  # fmt: skip
    pairs = zip(made.evaluations, costs, strict=True)
    return dataclasses.replace(made, evaluations=tuple(dataclasses.replace(e, costs=c) for e, c in pairs))


def seconds(run):
    return run.evaluations[-1].costs.net_seconds


def test_seconds_of_a_slowed_run_are_scaled_by_its_pace_of_evaluation():
    even = neighbour_runs.even_clock([slowed(slow, seed=seed) for seed, slow in enumerate((1.0, 1.5, 1.0))])
    assert [seconds(each) for each in even] == pytest.approx([96.0] * 3)


def test_imported_runs_are_brought_to_the_clock_of_the_runs_made_here(tmp_path, monkeypatch):
    """The other machine is half as fast; here one of two runs was slowed down. Every run costs one
    second per step of an idle machine.
    """
    rates = {"learning_rate_factors": [1, 3]}
    grid = Grid(
        str(tmp_path), LR, ["t"], [0, 1], {"max_steps": 96}, {"plain": {}, "forward_kl": rates, "opsa": {}}, workers=1
    )
    arms = [("plain", LR), ("forward_kl", LR), (neighbour_runs.DGRPO, LR), (neighbour_runs.DGRPO, 3 * LR)]
    there = [scaled(planted_run(name, rate, seed, task="t", noise=0.0), 2.0) for name, rate in arms for seed in (0, 1)]
    settings = grid.roles.to_settings() | {"base": grid.base, "strategies": grid.strategies}
    file = tmp_path / "there.json"
    file.write_text(json.dumps({"settings": settings, "runs": [to_row(run) for run in there]}))
    save_entries(grid, read_entries(grid, [file]))

    here = [slowed(1.0, "plain", task="t"), slowed(1.5, "opsa", task="t"), slowed(1.0, "opsa", seed=1, task="t")]
    asked = []
    monkeypatch.setattr(neighbour_runs, "made_here", lambda planned: (asked.extend(planned) or here, []))
    found = neighbour_runs.results_of(grid)
    runs = {key(run): run for run in map(from_row, found["runs"])}
    assert len(asked) == found["settings"]["planned_runs"] == 12 and found["settings"]["base"] == grid.base
    assert runs.keys() == {key(run) for run in (*here, *there)} and len(runs) == 10
    assert [seconds(run) for run in runs.values()] == pytest.approx([96.0] * 10)
    (merge,) = found["settings"]["merges"]
    assert merge["factor"] == pytest.approx(0.5) and merge["runs"] == sum(run.merges == (0,) for run in runs.values())

    made = []
    monkeypatch.setattr(neighbour_runs.subprocess, "run", lambda command, **more: made.append(command[-1]))
    neighbour_runs.reward(grid, neighbour_runs.Wanted())
    assert made == [] and len(neighbour_runs.reward_runs(grid)) == 4  # all of them are imported
    neighbour_runs.reward(dataclasses.replace(grid, seeds=[1, 2]), neighbour_runs.Wanted(rates=[LR]))
    assert [Path(settings).parts[-4:-1] for settings in made] == [("dgrpo", "lr-3e-05", "seed-2")]


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
    one, gain = SeedMedian(1.0, 1.0, 1.0, seconds[3]), SeedMedian(2.0, 1.5, 3.0, seconds[3])
    assert neighbours.verdict([SeedMedian(*seconds), SeedMedian(*tokens), one, one]) == text
    if "sampled tokens" in text:
        assert neighbours.verdict([SeedMedian(*seconds), SeedMedian(*tokens), gain, gain]) == "for tokens only"


def test_the_figure_is_drawn(tmp_path):
    page = neighbours.Page(results(1))
    assert {method.arm for method in page.methods} == {"plain", "teacher_top_k", "esr"}
    page.draw(tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 20_000


def test_a_part_without_a_file_leaves_the_page_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "PLACE", tmp_path)
    page = (pages.DOCS / "neighbours.md").read_text()
    assert all(part.texts() == {} for part in neighbours.PARTS) and pages.with_blocks(page, {}) == page
    first, other = neighbours.PARTS
    (tmp_path / other.file).write_text(json.dumps(results(1)))
    blocks, texts = neighbours.Page(results(1)).blocks(), other.texts()
    assert first.texts() == {} and set(first.blocks) == set(blocks)
    assert texts == {f"other teacher, {name}": blocks[name] for name in other.blocks}
    assert {"verdicts", "costs", "final"} < set(other.blocks)
    assert blocks["costs"] in pages.with_blocks(page, texts)


@pytest.mark.slow
def test_the_page_is_made_from_the_files():
    page = (pages.DOCS / "neighbours.md").read_text()
    for part in neighbours.PARTS:
        assert pages.with_blocks(page, part.texts()) == page, part.file


@pytest.mark.slow
@pytest.mark.parametrize("part", neighbours.PARTS, ids=lambda part: part.plan)
def test_the_runs_of_a_file_can_be_imported_into_its_plan(part):
    file = neighbours.PLACE / part.file
    if not file.is_file():
        pytest.skip("its runs are not made yet")
    grid = load_grid(neighbours.RECIPES / f"{part.plan}.yaml")
    (source,) = sources(grid, read_entries(grid, [file]), neighbour_runs.reward_runs(grid))
    assert len(source.runs) == len(json.loads(file.read_text())["runs"])


def test_another_plan_is_refused(monkeypatch, capsys):
    for what in ("collect", "rewards", "page"):
        monkeypatch.setattr("sys.argv", ["neighbours.py", what, "--plan", "recipes/compare-rivals.yaml"])
        with pytest.raises(SystemExit):
            neighbours.main()
        assert "expected one of recipes/compare-neighbours.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.stem)
def test_every_arm_of_a_plan_is_on_the_page(plan):
    grid = load_grid(plan)
    assert {name for method in neighbours.METHODS for name in neighbours._pair(method.arm)} >= set(grid.strategies)
    order = list(grid.strategies)
    first_ahead = order.index("newton_search")
    assert not any(grid.strategies[name].get("effopd") for name in order[:first_ahead])
    assert all(grid.strategies[name].get("effopd") for name in order[first_ahead:])
    assert all(len(grid.factors(name)) >= 3 for name in order) and len(grid.seeds) == 3 and len(grid.tasks) == 2


def test_every_method_of_the_page_is_in_the_first_plan():
    assert {method.arm for method in neighbours.METHODS} <= {*load_grid(PLANS[0]).strategies, neighbour_runs.DGRPO}


@pytest.mark.parametrize(
    "plan, root", zip(PLANS, ("neighbour-traces", "neighbour-traces-wide"), strict=True), ids=lambda v: Path(v).stem
)
def test_what_the_runs_read_is_collected_once(plan, root):
    """By the teacher of the plan, for the task and the seed of the runs that read it."""
    grid = load_grid(plan)
    stored, weak = neighbour_runs.stored_answers(grid.runs()), neighbour_runs.weak_teachers(grid.runs())
    folders = {task: Path("runs", root, task.replace(":", "-")) for task in grid.tasks}
    assert {folder: (run.task, run.seed) for folder, run in stored.items()} == {
        folders[task] / f"seed-{seed}" / sampler: (task, seed)
        for task in grid.tasks for seed in grid.seeds for sampler in ("student", "teacher")
    }  # fmt: skip
    assert {folder: run.task for folder, run in weak.items()} == {folders[t] / "weak-teacher": t for t in grid.tasks}
    teacher = grid.base["teacher_model_name_or_path"]
    assert {run.settings["curriculum_teachers"][1] for run in weak.values()} == {teacher}


def test_the_plan_of_the_other_teacher_has_the_settings_of_the_first():
    first, other = map(load_grid, PLANS)
    changed = {name for name in first.base if other.base[name] != first.base[name]}
    assert (
        changed == {"teacher_model_name_or_path", "max_steps", "eval_steps"} and first.base.keys() == other.base.keys()
    )
    rates = {f"{run.learning_rate:.2g}" for run in other.runs() if run.strategy != "plain"}
    assert rates == {"0.00015", "0.0003", "0.0006"}
    assert other.strategies.keys() == first.strategies.keys()
    own = ("rollouts", "traces", "curriculum_teachers", "learning_rate_factors")
    for name, settings in other.strategies.items():
        ours, theirs = ({k: v for k, v in s.items() if k not in own} for s in (settings, first.strategies[name]))
        assert ours == theirs, name


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.stem)
def test_runs_with_rewards_take_the_places_and_the_step_of_the_plan(plan):
    grid = load_grid(plan)
    runs = neighbour_runs.reward_runs(grid)
    assert len(runs) == len(grid.tasks) * len(grid.seeds) * 3 and len({run.path for run in runs}) == len(runs)
    answers = {run.settings["per_device_train_batch_size"] for run in runs}
    assert answers == {grid.base["per_device_train_batch_size"]}
    assert all(run.settings["output_dir"] == str(run.path) and "/dgrpo/" in str(run.path) for run in runs)
