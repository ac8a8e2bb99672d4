"""Runs of a grid that were made on other machines, read from their results.json.

Steps and tokens are the same wherever a run is made; seconds are not. Runs made on both machines tell by how much:

    factor = median over runs on both of  (seconds per forward token here) / (seconds per forward token there)

and the seconds of everything made there are multiplied by it: over the runs of the same task and seed where there are any,
over all others elsewhere. A speed-up divides seconds of one task and seed, so with the baseline made on both machines it is
the ratio that was measured on one of them. The runs that `to_make` asks for make sure that there are runs on both: the
baseline at the reference learning rate, for one seed of each task.

A grid can move on several times. Every run carries the merges that its seconds went through (`Run.merges`, indices into
`settings.elsewhere` of results.json), so that a run which was made anew later is counted for none of them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd.common.files import write_atomically
from effopd.compare.plan import FACTORS, Plan, PlannedRun
from effopd.compare.results import Run, from_row
from effopd.errors import ConfigError

#: In a grid's folder: what `--runs_from` was given.
ELSEWHERE = "elsewhere.json"


@dataclass(frozen=True)
class Source:
    """The runs of one results.json that belong to a plan, and the merges (`settings.elsewhere`) that it came out of."""

    path: str
    runs: tuple[Run, ...]
    earlier: tuple[Mapping[str, Any], ...] = ()


def given(plan: Plan, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What results.json files hold of the plan's grid: path, settings and runs of each.

    Raises:
        ConfigError: a file is no results.json, or its runs had other settings than the plan's.
    """
    entries = []
    for path in paths:
        try:
            found = json.loads(path.read_text())
            entries.append({"path": str(path), "settings": found["settings"], "runs": found["runs"]})
            _source(plan, entries[-1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--runs_from {path}: expected a results.json of `effopd compare` ({type(error).__name__}: {error})."
            ) from error
    return entries


def keep(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put what was `given` into the plan's folder, where `kept` finds it."""
    write_atomically(Path(plan.output_dir) / ELSEWHERE, lambda path: path.write_text(json.dumps(entries) + "\n"))


def kept(plan: Plan) -> list[dict[str, Any]]:
    """What `keep` put there, if anything."""
    path = Path(plan.output_dir) / ELSEWHERE
    return json.loads(path.read_text()) if path.is_file() else []


def sources(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The runs that belong to the plan; others are left out.

    Raises:
        ConfigError: the runs had other settings than the plan's.
    """
    return [_source(plan, entry) for entry in entries]


def _source(plan: Plan, entry: Mapping[str, Any]) -> Source:
    _belongs(plan, entry)
    planned = {key(run) for run in plan.runs()}
    runs = tuple(run for run in map(from_row, entry["runs"]) if key(run) in planned)
    return Source(entry["path"], runs, tuple(entry["settings"].get("elsewhere", ())))


def _belongs(plan: Plan, entry: Mapping[str, Any]) -> None:
    settings = entry["settings"]
    mine: dict[str, Any] = {
        "baseline": plan.baseline,
        "reference_learning_rate": plan.reference_learning_rate,
        "base": plan.base,
    }
    theirs: dict[str, Any] = {name: settings.get(name) for name in mine}
    for name in plan.strategies.keys() & settings.get("strategies", {}).keys():
        mine[f"strategies.{name}"], theirs[f"strategies.{name}"] = (
            {field: value for field, value in (strategies[name] or {}).items() if field != FACTORS}
            for strategies in (plan.strategies, settings["strategies"])
        )
    differing = []
    for name, value in mine.items():
        if isinstance(value, dict) and isinstance(theirs[name], dict):
            fields = sorted(f for f in {*value, *theirs[name]} if value.get(f) != theirs[name].get(f))
            differing += [f"{name}.{f} ({value.get(f)!r} here, {theirs[name].get(f)!r} there)" for f in fields]
        elif value != theirs[name]:
            differing.append(f"{name} ({value!r} here, {theirs[name]!r} there)")
    if differing:
        raise ConfigError(f"the runs of {entry['path']} had other settings than the plan: {'; '.join(differing)}.")


def key(run: Run | PlannedRun) -> tuple[str, str, float, int]:
    """Where a run stands in its grid."""
    return run.task, run.strategy, run.learning_rate, run.seed


def to_make(plan: Plan, found: Sequence[Source]) -> list[PlannedRun]:
    """The plan's runs that have to be made here; those that compare this machine with the others come first."""
    runs = plan.runs()
    if not found:
        return runs
    there = {key(run) for source in found for run in source.runs}
    arm = (plan.baseline, plan.reference_learning_rate)
    both = [
        next(r for r in runs if r.task == task and (r.strategy, r.learning_rate) == arm) for task in plan.tasks
    ]  # the first seed's
    return both + [run for run in runs if key(run) not in there and run not in both]


def merged(plan: Plan, here: Sequence[Run], found: Sequence[Source]) -> tuple[list[Run], list[dict[str, Any]]]:
    """All runs in the plan's order, with the seconds of this machine, and the merges that they came through.

    A run that is there twice counts once: the one made here, or else that of the first source. A source's factor for a task
    and seed is taken from all that is there already, also from sources before it.

    Returns:
        the runs, and a row for every merge, oldest first, a source's own earlier ones before it: `factor` (the median, for
        a task and seed without a run on both machines), `low`, `high` and `n` of the ratios, and `runs`: how many of the
        returned runs went through it.

    Raises:
        ConfigError: a source has no run in common with this machine, so that its seconds cannot be compared.
    """
    runs: dict[tuple, Run] = {key(run): run for run in here}
    notes: list[dict[str, Any]] = []
    own = dict(runs)
    for source in found:
        ratios = [ratio for _, ratio in _paces(own, source)]
        if not ratios:
            raise ConfigError(
                f"no finished run of {plan.output_dir} was made for {source.path} too, so seconds there and here cannot be "
                f"compared yet: let `effopd compare PLAN` finish {plan.baseline} at {plan.reference_learning_rate:.3g} for "
                f"one seed, or remove {Path(plan.output_dir) / ELSEWHERE}."
            )
        known = _paces(runs, source)
        places = {place: [ratio for other, ratio in known if other == place] for place, _ in known}
        factors = {place: statistics.median(found) for place, found in places.items()}
        factor, first = statistics.median(ratios), len(notes)
        notes += [dict(note) for note in source.earlier]
        for run in source.runs:
            if key(run) not in runs:
                moved = scaled(run, factors.get(run.place, factor))
                merges = (*(first + index for index in run.merges), len(notes))
                runs[key(run)] = dataclasses.replace(moved, merges=merges)
        notes.append({"factor": factor, "low": min(ratios), "high": max(ratios), "n": len(ratios)})
    ordered = [runs[place] for place in map(key, plan.runs()) if place in runs]
    return ordered, [note | {"runs": sum(i in run.merges for run in ordered)} for i, note in enumerate(notes)]


def _paces(runs: Mapping[tuple, Run], source: Source) -> list[tuple[tuple[str, int], float]]:
    """(task, seed) and pace / pace there of every run that is in both."""
    both = [(runs[key(run)], run) for run in source.runs if key(run) in runs]
    return [
        (ours.place, _pace(ours) / _pace(theirs)) for ours, theirs in both if _pace(ours) > 0 and _pace(theirs) > 0
    ]


def _pace(run: Run) -> float:
    """Net seconds per net forward token, over a whole run."""
    last = run.rows[-1]
    return last["cost/net_seconds"] / last["cost/net_forward_tokens"] if last["cost/net_forward_tokens"] else 0.0


def scaled(run: Run, factor: float) -> Run:
    """The run with all its seconds multiplied by `factor`."""
    rows = tuple(
        {name: value * factor if name.endswith("_seconds") else value for name, value in row.items()}
        for row in run.rows
    )
    return dataclasses.replace(run, rows=rows)
