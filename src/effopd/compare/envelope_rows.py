"""Envelope part of results.json: speed-up curves, opponents and tuning costs, per task and axis.

    {"label": "", "baselines": […], "shares": […], "axes": […], "seeds": […],
     "speedups":  [{task, strategy, learning_rate, axis, and per share: median, low, high, n,
                    reached, worst_seed, worst}],
     "opponents": [{task, axis, share, arms: {seed: [strategy, learning_rate]}, cost}],
     "tuning":    [{task, axis, cost, runs, seeds}],
     "without_costs": {axis: [strategies]}}

`cost` is the median over seeds of the opponent's cost to the target, `worst_seed` the seed with the
smallest speed-up, and `worst` this speed-up. A second envelope joins the runs of another grid, for
example with another batch size: its strategies get the grid's label, and all baselines compete.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from effopd.compare.axes import axis_key, envelope_axes
from effopd.compare.cross_targets import check_same_start, runs_of
from effopd.compare.envelope import CURVE, Envelope
from effopd.compare.grid import run_settings
from effopd.compare.grid_run import Arm, GridRun, finite
from effopd.compare.prices import PriceList
from effopd.compare.roles import Roles
from effopd.compare.token_kinds import derived
from effopd.errors import ConfigError


def envelope_rows(
    runs: Sequence[GridRun], baselines: Sequence[str], prices: Sequence[PriceList], label: str = ""
) -> dict[str, Any]:
    """Envelope part of results.json for the runs of one grid, or of two joined ones."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    axes = envelope_axes(prices)
    rows: dict[str, Any] = {
        "label": label, "baselines": list(baselines), "shares": list(CURVE), "axes": [axis_key(a) for a in axes],
        "seeds": sorted({run.seed for run in runs}), "speedups": [], "opponents": [], "tuning": [],
        "without_costs": {},
    }  # fmt: skip
    for axis in axes:
        for task in tasks:
            envelope = Envelope([run for run in runs if run.task == task], baselines, axis)
            where = {"task": task, "axis": axis_key(axis)}
            rows["speedups"] += [where | row for arm in envelope.arms if (row := _curve(envelope, arm))]
            rows["opponents"] += [where | _opponents(envelope, share) for share in CURVE]
            rows["tuning"].append(where | dataclasses.asdict(envelope.tuning()))
            if missing := {arm[0] for arm in envelope.without_costs()}:
                rows["without_costs"][axis_key(axis)] = sorted(
                    missing | set(rows["without_costs"].get(axis_key(axis), ()))
                )
    return rows


def _curve(envelope: Envelope, arm: Arm) -> dict[str, Any] | None:
    """Speed-ups of an arm by share; `None` without any cost on the axis."""
    by_share = [envelope.speedups(arm, share) for share in CURVE]
    if not any(by_share):
        return None
    medians = [envelope.speedup(arm, share).to_row() for share in CURVE]
    known = [[each for each in ratios.items() if not math.isnan(each[1])] for ratios in by_share]
    worst = [min(pairs, key=itemgetter(1), default=(None, math.nan)) for pairs in known]
    return {
        "strategy": arm[0],
        "learning_rate": arm[1],
        **{name: [_short(row[name]) for row in medians] for name in ("median", "low", "high", "n")},
        "reached": [sum(math.isfinite(envelope.cost(arm, seed, share)) for seed in envelope.seeds) for share in CURVE],
        "worst_seed": [seed for seed, _ in worst],
        "worst": [_short(finite(value)) for _, value in worst],
    }


def _short(value: float | None) -> float | int | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _opponents(envelope: Envelope, share: float) -> dict[str, Any]:
    arms = {seed: envelope.opponent(seed, share) for seed in envelope.seeds}
    costs = [envelope.cost(arm, seed, share) for seed, arm in arms.items() if arm is not None]
    return {
        "share": share,
        "arms": {str(seed): None if arm is None else list(arm) for seed, arm in arms.items()},
        "cost": _short(finite(statistics.median(costs))) if costs else None,
    }


def with_kinds_of_tokens(results: Mapping[str, Any]) -> tuple[list[GridRun], list[str]]:
    """Runs of a results.json with all kinds of tokens that it stores or that can be derived.

    Returns:
        The runs, and the strategies with a derived kind.
    """
    settings, runs = results["settings"], runs_of(results)
    same = {name for name, own in (settings.get("strategies") or {}).items() if set(run_settings(own)) <= {"effopd"}}
    found = derived(runs, settings["baseline"], same)
    changed = [run.strategy for run, old in zip(found, runs, strict=True) if run is not old]
    return found, list(dict.fromkeys(changed))


def envelopes(
    results: Mapping[str, Any], prices: Sequence[PriceList], other: tuple[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Parts `prices`, `envelope` and `joined_envelope` of results.json.

    Args:
        prices: price lists; none: those stored in `results`.
        other: label and results.json of a grid to join; `None`: a stored joined envelope is kept.

    Raises:
        ConfigError: the other grid cannot be joined (`joined_envelope`), or the stored joined
            envelope has other prices than `prices`.
    """
    lists = list(prices) or [PriceList(**row) for row in results.get("prices", ())]
    parts = {"prices": [each.to_row() for each in lists], "envelope": own_envelope(results, lists)}
    stored = results.get("joined_envelope")
    if other is not None:
        parts["joined_envelope"] = joined_envelope(results, other[1], other[0], lists)
    elif stored is not None and parts["prices"] != results.get("prices", []):
        raise ConfigError(
            f"--prices: the stored envelope joined with '{stored['label']}' has other prices. "
            f"Add --join '{stored['label']}=RESULTS_JSON' to compute it again."
        )
    return parts


def own_envelope(results: Mapping[str, Any], prices: Sequence[PriceList]) -> dict[str, Any]:
    """Envelope of a grid's own baselines."""
    runs, found = with_kinds_of_tokens(results)
    return envelope_rows(runs, Roles.of_settings(results["settings"]).rivals_to_beat, prices) | {"derived": found}


def joined_envelope(
    results: Mapping[str, Any], other: Mapping[str, Any], label: str, prices: Sequence[PriceList]
) -> dict[str, Any]:
    """Envelope of the baselines of two grids, over the tasks and seeds that both have.

    Strategies of `other` are called `STRATEGY (LABEL)`.

    Raises:
        ConfigError: the grids share no task and seed, or start at different held-out KLs there.
    """
    here, found = with_kinds_of_tokens(results)
    there, found_there = with_kinds_of_tokens(other)
    places = {run.place for run in here} & {run.place for run in there}
    if not places:
        raise ConfigError(f"--join {label}: expected a grid with a task and a seed of this one; there is none.")
    firsts = {run.place: run for run in here}
    for run in there:
        if run.place in places:
            check_same_start(firsts[run.place], run)
    renamed = [dataclasses.replace(run, strategy=f"{run.strategy} ({label})") for run in there]
    both = [run for run in [*here, *renamed] if run.place in places]
    roles, others = (Roles.of_settings(each["settings"]) for each in (results, other))
    baselines = [*roles.rivals_to_beat, *(f"{name} ({label})" for name in others.rivals_to_beat)]
    opening = others.opening(list(dict.fromkeys(run.strategy for run in there)))
    return envelope_rows(both, baselines, prices, label) | {
        "derived": [*found, *(f"{name} ({label})" for name in found_there)],
        "opening": [f"{name} ({label})" for name in opening],
    }
