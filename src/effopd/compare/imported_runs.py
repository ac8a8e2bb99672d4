"""Runs of a grid made on other machines, read from their results.json, with seconds rescaled.

Steps and tokens do not depend on the machine; seconds do. Imported seconds are multiplied by a
factor taken from the runs made on both machines:

    factor = median of (seconds per forward token here) / (seconds per forward token there)

The median is over runs of the same task and seed if there are any, otherwise over all runs made on
both machines. A speed-up divides seconds of one task and seed. With the baseline made on both
machines, it therefore equals the ratio measured on one machine. For this purpose `runs_to_make`
includes a run of the baseline per task.

A grid can move several times. Every run lists the merges that rescaled its seconds
(`GridRun.merges`, indices into `settings.merges` of results.json). A run repeated on this machine
lists none.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd.common.files import write_atomically
from effopd.compare.grid import Grid, PlannedRun, merge, run_settings
from effopd.compare.grid_run import GridRun, Place, from_row
from effopd.errors import ConfigError

#: File in a grid's folder with the contents of the `--runs_from` files.
IMPORTED = "imported_runs.json"


@dataclass(frozen=True)
class Source:
    """Runs of one results.json that belong to a plan, with that file's `settings.merges`."""

    path: str
    runs: tuple[GridRun, ...]
    merges: tuple[Mapping[str, Any], ...] = ()


def read_entries(grid: Grid, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Path, settings and runs of each results.json.

    Raises:
        ConfigError: a file is not a results.json, or its settings differ from the plan's.
    """
    entries = []
    for path in paths:
        try:
            results = json.loads(path.read_text())
            entries.append({"path": str(path), "settings": results["settings"], "runs": results["runs"]})
            _source(grid, entries[-1])
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--runs_from {path}: expected a results.json of `effopd compare` ({type(error).__name__}: {error})."
            ) from error
    return entries


def save_entries(grid: Grid, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write entries to the grid's folder, for `saved_entries`."""
    write_atomically(Path(grid.output_dir) / IMPORTED, lambda path: path.write_text(json.dumps(entries) + "\n"))


def saved_entries(grid: Grid) -> list[dict[str, Any]]:
    """Entries saved in the grid's folder; empty if there are none."""
    path = Path(grid.output_dir) / IMPORTED
    return json.loads(path.read_text()) if path.is_file() else []


def sources(grid: Grid, entries: Sequence[Mapping[str, Any]], more: Sequence[PlannedRun] = ()) -> list[Source]:
    """Runs of each entry that belong to the plan.

    Args:
        more: runs that belong to it as well, made by another command than `effopd compare`.

    Raises:
        ConfigError: an entry's settings differ from the plan's.
    """
    return [_source(grid, entry, more) for entry in entries]


def check_same_settings(grid: Grid, path: str | Path, results: Mapping[str, Any]) -> None:
    """Check the settings of the runs in a results.json (`settings`, `runs`) against the plan's.

    Raises:
        ConfigError: settings that affect runs differ.
    """
    differing = list(_differences(grid, results))
    if differing:
        raise ConfigError(
            f"the runs of {path} have other settings than the plan: {'; '.join(differing)}. "
            "Make the plan's settings equal or leave the file out."
        )


def _source(grid: Grid, entry: Mapping[str, Any], more: Sequence[PlannedRun] = ()) -> Source:
    check_same_settings(grid, entry["path"], entry)
    planned = {key(run) for run in (*grid.runs(), *more)}
    runs = tuple(run for run in map(from_row, entry["runs"]) if key(run) in planned)
    return Source(entry["path"], runs, tuple(entry["settings"].get("merges", ())))


def _differences(grid: Grid, results: Mapping[str, Any]) -> Iterator[str]:
    """Settings that affect runs and differ, each as `name (value here, value there)`.

    A strategy or task without runs in the file affects none.
    """
    settings = results["settings"]
    ran = {name for run in results["runs"] for name in (run["strategy"], run["task"])}
    ours: dict[str, Any] = {
        "baseline": grid.baseline,
        "reference_learning_rate": grid.reference_learning_rate,
        "base": grid.base,
    }
    theirs: dict[str, Any] = {name: settings.get(name) for name in ours}
    for name in grid.strategies.keys() & settings.get("strategies", {}).keys() & ran:
        ours[f"strategies.{name}"] = run_settings(grid.strategies[name])
        theirs[f"strategies.{name}"] = run_settings(settings["strategies"][name])
    here, there = _by_task(grid.tasks), _by_task(settings.get("tasks", ()))
    for task in here.keys() & there.keys() & ran:
        for side, own, base in ((ours, here, grid.base), (theirs, there, settings["base"])):
            merged = merge(base, own[task])
            side[f"tasks.{task}"] = {name: merged.get(name) for name in {*here[task], *there[task]}}
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, dict) and isinstance(other, dict):
            fields = sorted(f for f in {*value, *other} if value.get(f) != other.get(f))
            yield from (f"{name}.{f} ({value.get(f)!r} here, {other.get(f)!r} there)" for f in fields)
        elif value != other:
            yield f"{name} ({value!r} here, {other!r} there)"


def _by_task(tasks: Sequence[str] | Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A plan's settings of each task; files without `tasks` have none."""
    return {task: tasks[task] or {} for task in tasks} if isinstance(tasks, Mapping) else {task: {} for task in tasks}


def key(run: GridRun | PlannedRun) -> tuple[str, str, float, int]:
    """Place of a run in its grid: task, strategy, learning rate and seed."""
    return run.task, run.strategy, run.learning_rate, run.seed


def runs_to_make(grid: Grid, imported: Sequence[Source]) -> list[PlannedRun]:
    """Runs of the plan to make on this machine; those that set the rescaling factor come first.

    These are, per task, a run that a source has too: of the baseline if possible, and at the
    reference learning rate. For a task without such a run, it is the baseline's first one at that
    rate.
    """
    runs = grid.runs()
    if not imported:
        return runs
    made_there = {key(run) for source in imported for run in source.runs}

    def unfit(run: PlannedRun) -> tuple[bool, ...]:
        other_rate = run.learning_rate != grid.reference_learning_rate
        return key(run) not in made_there, run.strategy != grid.baseline, other_rate

    shared = [min((run for run in runs if run.task == task), key=unfit) for task in grid.tasks]
    return shared + [run for run in runs if key(run) not in made_there and run not in shared]


def merge_runs(
    grid: Grid, made_here: Sequence[GridRun], imported: Sequence[Source], more: Sequence[PlannedRun] = ()
) -> tuple[list[GridRun], list[dict[str, Any]]]:
    """All runs in the plan's order, with seconds of this machine, and the merges applied to them.

    A run available more than once counts once: the one made here, otherwise that of the first
    source. A source's factor for a task and seed uses all runs merged so far, including those of
    earlier sources.

    Args:
        more: as for `sources`; these runs come last.

    Returns:
        The runs, and one row per merge, oldest first; a source's own earlier merges precede its
        row. A row has `factor` (the median, used for a task and seed without a run on both
        machines), `low`, `high` and `n` of the ratios, and `runs` (number of returned runs that
        the merge rescaled).

    Raises:
        ConfigError: a source has no run in common with this machine, so its seconds cannot be
            rescaled.
    """
    runs: dict[tuple, GridRun] = {key(run): run for run in made_here}
    measured_here = dict(runs)
    merges: list[dict[str, Any]] = []
    for source in imported:
        ratios = [ratio for _, ratio in _pace_ratios(measured_here, source)]
        if not ratios:
            raise ConfigError(
                f"{grid.output_dir} and {source.path} have no finished run in common, so seconds cannot be compared "
                "yet. Let `effopd compare PLAN`, without --only, finish a run that the file holds, too, which it "
                f"makes first, or remove {Path(grid.output_dir) / IMPORTED}."
            )
        by_place: dict[Place, list[float]] = {}
        for place, ratio in _pace_ratios(runs, source):
            by_place.setdefault(place, []).append(ratio)
        factors = {place: statistics.median(of_place) for place, of_place in by_place.items()}
        factor, first = statistics.median(ratios), len(merges)
        merges += [dict(row) for row in source.merges]
        for run in source.runs:
            if key(run) not in runs:
                chain = (*(first + index for index in run.merges), len(merges))
                runs[key(run)] = dataclasses.replace(scaled(run, factors.get(run.place, factor)), merges=chain)
        merges.append({"factor": factor, "low": min(ratios), "high": max(ratios), "n": len(ratios)})
    ordered = [runs[place] for place in map(key, (*grid.runs(), *more)) if place in runs]
    return ordered, [row | {"runs": sum(i in run.merges for run in ordered)} for i, row in enumerate(merges)]


def _pace_ratios(runs: Mapping[tuple, GridRun], source: Source) -> list[tuple[Place, float]]:
    """(task, seed) and pace here / pace there of every run in both."""
    both = [(runs[key(run)], run) for run in source.runs if key(run) in runs]
    paces = [(ours.place, _pace(ours), _pace(theirs)) for ours, theirs in both]
    return [(place, ours / theirs) for place, ours, theirs in paces if ours > 0 and theirs > 0]


def _pace(run: GridRun) -> float:
    """Net seconds per net forward token of the whole run."""
    costs = run.evaluations[-1].costs
    return (costs.net_seconds or 0.0) / costs.net_forward_tokens if costs.net_forward_tokens else 0.0


def scaled(run: GridRun, factor: float) -> GridRun:
    """The run with all its seconds multiplied by `factor`."""

    def rescale(costs: Any) -> Any:
        seconds = {f.name: getattr(costs, f.name) for f in dataclasses.fields(costs) if f.name.endswith("_seconds")}
        return dataclasses.replace(costs, **{n: value * factor for n, value in seconds.items() if value is not None})

    evaluations = tuple(dataclasses.replace(e, costs=rescale(e.costs)) for e in run.evaluations)
    return dataclasses.replace(run, evaluations=evaluations)
