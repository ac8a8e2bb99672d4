"""Runs of a grid that were made on other machines, read from their results.json.

Steps and tokens are the same wherever a run is made; seconds are not. Runs made on both machines
give the factor:

    factor = median over runs on both of  (seconds per forward token here) / (seconds per forward
    token there)

All seconds made there are multiplied by it: over the runs of the same task and seed where there are
any, over all others elsewhere. A speed-up divides seconds of one task and seed, so with the
baseline made on both machines it is the ratio that was measured on one of them. `runs_to_make`
makes sure that there are runs on both: the baseline at the reference learning rate, for one seed of
each task.

A grid can move on several times. Every run carries the merges that its seconds went through
(`GridRun.merges`, indices into `settings.merges` of results.json), so that a run which was made
anew later is counted for none of them.
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
from effopd.compare.grid import Grid, PlannedRun, run_settings
from effopd.compare.grid_run import GridRun, Place, from_row
from effopd.errors import ConfigError

#: In a grid's folder: what was read from the files of `--runs_from`.
IMPORTED = "imported_runs.json"


@dataclass(frozen=True)
class Source:
    """The runs of one results.json that belong to a plan, and the merges (`settings.merges`) that
    it came out of.
    """

    path: str
    runs: tuple[GridRun, ...]
    merges: tuple[Mapping[str, Any], ...] = ()


def read_entries(grid: Grid, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Path, settings and runs of each results.json.

    Raises:
        ConfigError: a file is no results.json, or its runs had other settings than the plan's.
    """
    entries = []
    for path in paths:
        try:
            results = json.loads(path.read_text())
            entries.append({"path": str(path), "settings": results["settings"], "runs": results["runs"]})
            _source(grid, entries[-1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--runs_from {path}: expected a results.json of `effopd compare` ({type(error).__name__}: {error})."
            ) from error
    return entries


def save_entries(grid: Grid, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put entries into the grid's folder, where `saved_entries` finds them."""
    write_atomically(Path(grid.output_dir) / IMPORTED, lambda path: path.write_text(json.dumps(entries) + "\n"))


def saved_entries(grid: Grid) -> list[dict[str, Any]]:
    """The entries in the grid's folder, if any."""
    path = Path(grid.output_dir) / IMPORTED
    return json.loads(path.read_text()) if path.is_file() else []


def sources(grid: Grid, entries: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The runs that belong to the plan; others are left out.

    Raises:
        ConfigError: the runs had other settings than the plan's.
    """
    return [_source(grid, entry) for entry in entries]


def _source(grid: Grid, entry: Mapping[str, Any]) -> Source:
    differing = list(_differences(grid, entry["settings"]))
    if differing:
        raise ConfigError(f"the runs of {entry['path']} had other settings than the plan: {'; '.join(differing)}.")
    planned = {key(run) for run in grid.runs()}
    runs = tuple(run for run in map(from_row, entry["runs"]) if key(run) in planned)
    return Source(entry["path"], runs, tuple(entry["settings"].get("merges", ())))


def _differences(grid: Grid, settings: Mapping[str, Any]) -> Iterator[str]:
    """What decides a run and differs, each as `name (value here, value there)`."""
    ours: dict[str, Any] = {
        "baseline": grid.baseline,
        "reference_learning_rate": grid.reference_learning_rate,
        "base": grid.base,
    }
    theirs: dict[str, Any] = {name: settings.get(name) for name in ours}
    for name in grid.strategies.keys() & settings.get("strategies", {}).keys():
        ours[f"strategies.{name}"] = run_settings(grid.strategies[name])
        theirs[f"strategies.{name}"] = run_settings(settings["strategies"][name])
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, dict) and isinstance(other, dict):
            fields = sorted(f for f in {*value, *other} if value.get(f) != other.get(f))
            yield from (f"{name}.{f} ({value.get(f)!r} here, {other.get(f)!r} there)" for f in fields)
        elif value != other:
            yield f"{name} ({value!r} here, {other!r} there)"


def key(run: GridRun | PlannedRun) -> tuple[str, str, float, int]:
    """Where a run stands in its grid."""
    return run.task, run.strategy, run.learning_rate, run.seed


def runs_to_make(grid: Grid, imported: Sequence[Source]) -> list[PlannedRun]:
    """The plan's runs that have to be made here; those that compare this machine with the others
    come first.
    """
    runs = grid.runs()
    if not imported:
        return runs
    made_there = {key(run) for source in imported for run in source.runs}
    reference = (grid.baseline, grid.reference_learning_rate)
    first_seed = [
        next(r for r in runs if r.task == task and (r.strategy, r.learning_rate) == reference) for task in grid.tasks
    ]
    return first_seed + [run for run in runs if key(run) not in made_there and run not in first_seed]


def merge_runs(
    grid: Grid, made_here: Sequence[GridRun], imported: Sequence[Source]
) -> tuple[list[GridRun], list[dict[str, Any]]]:
    """All runs in the plan's order, with the seconds of this machine, and the merges that they came
    through.

    A run that is in several places counts once: the one made here, or else that of the first
    source. A source's factor for a task and seed is taken from all runs merged so far, also from
    sources before it.

    Returns:
        the runs, and a row for every merge, oldest first, a source's own earlier ones before it:
        `factor` (the median, for a task and seed without a run on both machines), `low`, `high` and
        `n` of the ratios, and `runs`: how many of the returned runs went through it.

    Raises:
        ConfigError: a source has no run in common with this machine, so that its seconds cannot be
            compared.
    """
    runs: dict[tuple, GridRun] = {key(run): run for run in made_here}
    measured_here = dict(runs)
    merges: list[dict[str, Any]] = []
    for source in imported:
        ratios = [ratio for _, ratio in _pace_ratios(measured_here, source)]
        if not ratios:
            raise ConfigError(
                f"no finished run of {grid.output_dir} was made for {source.path} too, so "
                "seconds there and here cannot be "
                f"compared yet: let `effopd compare PLAN` finish {grid.baseline} at "
                f"{grid.reference_learning_rate:.3g} for "
                f"one seed, or remove {Path(grid.output_dir) / IMPORTED}."
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
    ordered = [runs[place] for place in map(key, grid.runs()) if place in runs]
    return ordered, [row | {"runs": sum(i in run.merges for run in ordered)} for i, row in enumerate(merges)]


def _pace_ratios(runs: Mapping[tuple, GridRun], source: Source) -> list[tuple[Place, float]]:
    """(task, seed) and pace / pace there of every run that is in both."""
    both = [(runs[key(run)], run) for run in source.runs if key(run) in runs]
    paces = [(ours.place, _pace(ours), _pace(theirs)) for ours, theirs in both]
    return [(place, ours / theirs) for place, ours, theirs in paces if ours > 0 and theirs > 0]


def _pace(run: GridRun) -> float:
    """Net seconds per net forward token, over a whole run."""
    costs = run.evaluations[-1].costs
    return (costs.net_seconds or 0.0) / costs.net_forward_tokens if costs.net_forward_tokens else 0.0


def scaled(run: GridRun, factor: float) -> GridRun:
    """The run with all its seconds multiplied by `factor`."""

    def rescale(costs: Any) -> Any:
        seconds = {f.name: getattr(costs, f.name) for f in dataclasses.fields(costs) if f.name.endswith("_seconds")}
        return dataclasses.replace(costs, **{n: value * factor for n, value in seconds.items() if value is not None})

    evaluations = tuple(dataclasses.replace(e, costs=rescale(e.costs)) for e in run.evaluations)
    return dataclasses.replace(run, evaluations=evaluations)
