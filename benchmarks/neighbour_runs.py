"""Runs of docs/neighbours.md: stored answers, a weak teacher, dGRPO, and results of a grid.

`neighbours.py` has the commands.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from effopd.commands.main import main as effopd
from effopd.common.versions import code
from effopd.compare.grid import Grid, PlannedRun, folder_name, load_grid
from effopd.compare.grid_run import GridRun, read_run, to_row
from effopd.compare.imported_runs import scaled
from effopd.compare.runner import DONE, LOG, SETTINGS, is_done

RECIPE = Path(__file__).parents[1] / "recipes" / "compare-neighbours.yaml"
#: Place of the stored answers below the working directory, as in the plan.
TRACES = Path("runs/neighbour-traces")
#: Stored answers per task and seed: each is used four times in 32 steps of 32.
STORED = 256
#: Arm that `effopd rl` trains, so the plan does not list it.
DGRPO = "dgrpo"


def even_clock(runs: Sequence[GridRun]) -> list[GridRun]:
    """Runs with seconds scaled to the median pace of evaluation: seconds per sampled token.

    Every run evaluates the same prompts as often, so its pace shows how much other processes on the
    machine slowed it down.
    """
    paces = [cost.eval_seconds / cost.eval_generated_tokens for cost in (run.evaluations[-1].costs for run in runs)]
    middle = statistics.median(paces) if paces else 1.0
    return [scaled(run, middle / pace) for run, pace in zip(runs, paces, strict=True)]


def results_of(folder: Path) -> dict[str, Any]:
    """The finished runs of the plan in a grid's folder, with the plan's settings."""
    grid = load_grid(RECIPE, output_dir=str(folder))
    steps = {run.task: run.settings["max_steps"] for run in grid.runs()}
    runs = [
        first_steps(
            read_run(
                run.path, task=run.task, strategy=run.strategy, learning_rate=run.learning_rate, seed=run.seed,
                code=json.loads((run.path / DONE).read_text())["code"],
            ),
            steps[run.task],
        )
        for run in [*grid.runs(), *reward_runs(grid)] if is_done(run)
    ]  # fmt: skip
    runs = even_clock(runs)
    settings = {
        "planned_runs": len(grid.runs()) + len(reward_runs(grid)),
        "base": grid.base,
        "strategies": grid.strategies,
    }
    return {"settings": settings, "runs": [to_row(run) for run in runs]}


def first_steps(run: GridRun, steps: int) -> GridRun:
    """The run up to a step; at a constant learning rate, that is a run of so many steps."""
    return dataclasses.replace(run, evaluations=tuple(e for e in run.evaluations if e.step <= steps))


def reward_runs(grid: Grid) -> list[PlannedRun]:
    """Runs of dGRPO at the plan's tasks, seeds and rates: 4 prompts × 8 answers per step.

    All take the steps of the plan's base; `results_of` reads the steps of the task.
    """
    runs = []
    for run in grid.runs():
        if run.strategy == "forward_kl":  # any arm with the plan's three rates
            path = Path(str(run.path).replace("/forward_kl/", f"/{DGRPO}/"))
            own = {name: run.settings[name] for name in ("task", "learning_rate", "seed", "task_seed")}
            settings = {**grid.base, **own, "algorithm": "dgrpo", "num_generations": 8, "output_dir": str(path)}
            runs.append(PlannedRun(run.task, DGRPO, run.learning_rate, run.seed, path, settings))
    return runs


def reward(seeds: Sequence[int] | None, tasks: Sequence[str] | None, rates: Sequence[float] | None) -> None:
    """Make the missing runs of dGRPO, one process each."""
    for run in reward_runs(load_grid(RECIPE)):
        wanted = ((seeds, run.seed), (tasks, run.task), (rates, run.learning_rate))
        if (run.path / DONE).is_file() or any(chosen and value not in chosen for chosen, value in wanted):
            continue
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / SETTINGS).write_text(yaml.safe_dump(run.settings))
        command = [sys.executable, "-m", "effopd.commands.main", "rl", "--config", str(run.path / SETTINGS)]
        with (run.path / LOG).open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        (run.path / DONE).write_text(json.dumps({"code": code()}) + "\n")
        print("done", run.name, flush=True)


def collect(seeds: Sequence[int] | None, tasks: Sequence[str] | None) -> None:
    """`effopd cache` for every task and seed of the plan: rollouts and traces."""
    grid = load_grid(RECIPE)
    base = grid.base
    for task in tasks or list(grid.tasks):
        for seed in seeds or grid.seeds:
            for sampler in ("student", "teacher"):
                status = effopd([
                    "cache", "--model_name_or_path", base["model_name_or_path"], "--teacher_model_name_or_path",
                    base["teacher_model_name_or_path"], "--task", task, "--train_size", str(STORED), "--task_seed",
                    str(seed), "--seed", str(seed), "--max_completion_length", str(base["max_completion_length"]),
                    "--batch_size", "128", "--sampled_by", sampler, "--output_dir",
                    str(TRACES / folder_name(task) / f"seed-{seed}" / sampler),
                ])  # fmt: skip
                if status:
                    raise SystemExit(status)
        weak_teacher(base, task)


def weak_teacher(base: Mapping[str, Any], task: str) -> None:
    """CLPD's weak teacher: the student after four steps of plain OPD at 3e-4, by seed 99."""
    folder = TRACES / folder_name(task) / "weak-teacher"
    if (folder / "model.safetensors").is_file():
        return
    settings = {
        **base, "task": task, "max_steps": 4, "learning_rate": 3e-4, "seed": 99, "task_seed": 99,
        "eval_strategy": "no", "eval_on_start": False, "output_dir": str(folder),
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        if status := effopd(["train", "--config", file.name]):
            raise SystemExit(status)
