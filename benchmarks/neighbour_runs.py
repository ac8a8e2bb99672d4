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
from typing import Any, NamedTuple

import yaml

from effopd.commands.main import main as effopd
from effopd.common.versions import code
from effopd.compare.collect import made_here
from effopd.compare.grid import Grid, PlannedRun
from effopd.compare.grid_run import GridRun, to_row
from effopd.compare.imported_runs import key, merge_runs, saved_entries, scaled, sources
from effopd.compare.runner import DONE, LOG, SETTINGS, is_done, prepare

#: Stored answers per task and seed: each is used four times in 32 steps of 32, six times in 48.
STORED = 256
#: Arm that `effopd rl` trains, so the plan does not list it.
DGRPO = "dgrpo"


def even_clock(runs: Sequence[GridRun]) -> list[GridRun]:
    """Runs with seconds scaled to the median pace of evaluation: seconds per sampled token.

    Every run evaluates the same prompts as often, so its pace shows how much other processes on the
    machine slowed it down. For runs read from their folders: a results.json has no such pace.
    """
    paces = [cost.eval_seconds / cost.eval_generated_tokens for cost in (run.evaluations[-1].costs for run in runs)]
    middle = statistics.median(paces) if paces else 1.0
    return [scaled(run, middle / pace) for run, pace in zip(runs, paces, strict=True)]


def results_of(grid: Grid) -> dict[str, Any]:
    """The plan's runs that ended, with its settings: those of its folder, and imported ones.

    Runs of the folder are brought to one clock first (`even_clock`). Imported runs were brought to
    theirs when their results.json was written, and are then rescaled to this one (`merge_runs`).
    """
    rewards = reward_runs(grid)
    steps = {run.task: run.settings["max_steps"] for run in grid.runs()}
    made, _ = made_here([*grid.runs(), *rewards])
    made = even_clock([first_steps(run, steps[run.task]) for run in made])
    runs, merges = merge_runs(grid, made, sources(grid, saved_entries(grid), rewards), rewards)
    settings = grid.roles.to_settings() | {
        "planned_runs": len(grid.runs()) + len(rewards),
        "merges": merges,
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


class Wanted(NamedTuple):
    """Seeds, tasks and learning rates to make now; `None`: all."""

    seeds: Sequence[int] | None = None
    tasks: Sequence[str] | None = None
    rates: Sequence[float] | None = None

    def has(self, run: PlannedRun) -> bool:
        """Whether a run is one of them."""
        pairs = ((self.seeds, run.seed), (self.tasks, run.task), (self.rates, run.learning_rate))
        return not any(chosen and value not in chosen for chosen, value in pairs)


def reward(grid: Grid, wanted: Wanted) -> None:
    """Make the runs of dGRPO that are neither finished nor imported, one process each."""
    runs = reward_runs(grid)
    imported = {key(run) for source in sources(grid, saved_entries(grid), runs) for run in source.runs}
    for run in runs:
        if is_done(run) or key(run) in imported or not wanted.has(run):
            continue
        prepare(run)
        command = [sys.executable, "-m", "effopd.commands.main", "rl", "--config", str(run.path / SETTINGS)]
        with (run.path / LOG).open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        (run.path / DONE).write_text(json.dumps({"code": code()}) + "\n")
        print("done", run.name, flush=True)


def collect(grid: Grid, wanted: Wanted) -> None:
    """Make all that the plan's runs read: stored answers by `effopd cache`, and weak teachers."""
    base = grid.base
    runs = [run for run in grid.runs() if wanted.has(run)]
    for folder, run in stored_answers(runs).items():
        status = effopd([
            "cache", "--model_name_or_path", base["model_name_or_path"], "--teacher_model_name_or_path",
            base["teacher_model_name_or_path"], "--task", run.task, "--train_size", str(STORED), "--task_seed",
            str(run.seed), "--seed", str(run.seed), "--max_completion_length", str(base["max_completion_length"]),
            "--batch_size", "128", "--sampled_by", folder.name, "--output_dir", str(folder),
        ])  # fmt: skip
        if status:
            raise SystemExit(status)
    for folder, run in weak_teachers(runs).items():
        make_weak_teacher(base, run.task, folder)


def stored_answers(runs: Sequence[PlannedRun]) -> dict[Path, PlannedRun]:
    """Folder of stored answers → a run that reads it. The folder's name is that of the sampler."""
    return {Path(run.settings[name]): run for run in runs for name in ("rollouts", "traces") if name in run.settings}


def weak_teachers(runs: Sequence[PlannedRun]) -> dict[Path, PlannedRun]:
    """Folder of CLPD's weak teacher → a run that reads it."""
    return {Path(teachers[0]): run for run in runs if (teachers := run.settings.get("curriculum_teachers"))}


def make_weak_teacher(base: Mapping[str, Any], task: str, folder: Path) -> None:
    """CLPD's weak teacher: the student after four steps of plain OPD at 3e-4, by seed 99."""
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
