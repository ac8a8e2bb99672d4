"""Results of the finished runs in a grid's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effopd.common.files import read_rows
from effopd.compare.cross_targets import runs_of
from effopd.compare.grid import Grid, PlannedRun, load_grid
from effopd.compare.grid_run import GridRun, read_run
from effopd.compare.imported_runs import check_same_settings, merge_runs, saved_entries, sources
from effopd.compare.results import analyze_runs
from effopd.compare.runner import DONE, failure_of, is_done
from effopd.compare.same_inputs import check_same_content
from effopd.errors import ConfigError, NonFiniteLossError
from effopd.runs.records import EVALS

PLAN = "plan.yaml"


def collect(folder: Path) -> dict[str, Any]:
    """Results of all finished runs of a grid.

    Failures other than a non-finite loss are listed in `settings.failed`.

    Raises:
        ConfigError: the folder is not a grid, or no run is finished.
    """
    if not folder.exists():
        raise ConfigError(
            f"{folder}: no such folder (working directory: {Path.cwd()}). Expected the folder of a grid, or a "
            "results.json of `effopd compare`."
        )
    if not (folder / PLAN).is_file():
        raise ConfigError(f"{folder} is not a grid of `effopd compare`: expected {PLAN} in it.")
    grid = load_grid(folder / PLAN, output_dir=str(folder))
    if not any(is_done(run) for run in grid.runs()):
        raise ConfigError(f"no run of {folder} is finished yet. Start the grid with `effopd compare PLAN`.")
    made, failed = made_here(grid.runs())
    runs, merges = merge_runs(grid, made, sources(grid, saved_entries(grid)))
    results = analyze_runs(runs, grid.roles)
    results["settings"] |= {
        "clock": grid.base.get("cost_clock", "wall"),
        "workers": grid.workers,
        "threads": grid.threads,
        "planned_runs": len(grid.runs()),
        "merges": merges,
        "failed": failed,
        "strategies": grid.strategies,
        "base": grid.base,
        "tasks": grid.tasks,
    }
    return results


def made_here(planned: Sequence[PlannedRun]) -> tuple[list[GridRun], list[str]]:
    """The runs that ended in their folders, and a line `NAME: ERROR` for each that failed.

    A run that ended with a non-finite loss counts as never reaching its targets.

    Raises:
        ConfigError: runs with the same settings read another teacher, student or data.
    """
    done = {run.path: run for run in planned if is_done(run)}
    check_same_content(list(done.values()))
    failed = [(run, error) for run in planned if run.path not in done and (error := failure_of(run))]
    diverged = [run for run, error in failed if _has_diverged(run, error)]
    runs = [_read(run) for run in done.values()] + [_read(run).diverged() for run in diverged]
    return runs, [f"{run.name}: {error}" for run, error in failed if not _has_diverged(run, error)]


def with_roles(results: Mapping[str, Any], grid: Grid, source: Path) -> dict[str, Any]:
    """The runs of a results.json analyzed again with the roles of a plan.

    Raises:
        ConfigError: the runs have other settings than the plan's.
    """
    check_same_settings(grid, source, results)
    again = analyze_runs(runs_of(results), grid.roles)
    stored = results["settings"].get("strategies", {})
    strategies = {name: grid.strategies.get(name, own) for name, own in stored.items()}
    settings = {**results["settings"], **again["settings"], "strategies": strategies}
    return {**results, **again, "settings": settings}


def _has_diverged(run: PlannedRun, error: str) -> bool:
    """Whether a run ended with a non-finite loss after at least one evaluation."""
    return NonFiniteLossError.__name__ in error and any(read_rows(run.path / EVALS))


def _read(run: PlannedRun) -> GridRun:
    done = run.path / DONE
    code = json.loads(done.read_text()).get("code") if done.is_file() else None
    return read_run(
        run.path, task=run.task, strategy=run.strategy, learning_rate=run.learning_rate, seed=run.seed, code=code
    )
