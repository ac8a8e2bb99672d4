"""Metrics of whole runs: how early the final directions emerge, and whether runs agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from effopd.analysis import table_queries
from effopd.analysis.tables import read_table
from effopd.common.statistics import Interval, bootstrap_mean

#: Share of training at which early directions are compared with the final ones.
EARLY = 0.1
#: Sizes of the leading subspace in the summary.
_KS = (1, 2, 5, 10, 16, 20)
_OVERLAPS = ["left_overlap", "right_overlap"]

Runs = Mapping[str, Mapping[str, Any]]


def moving_runs(matrices: pd.DataFrame, runs: Runs) -> dict[str, list[int]]:
    """Run → steps of its snapshots that moved, for runs with at least two of them."""
    moved = {name: table_queries.moved_steps(matrices, name) for name in runs}
    return {name: steps for name, steps in moved.items() if len(steps) > 1}


def early_step(steps: list[int]) -> int:
    """The snapshot nearest to 10 % of training."""
    return table_queries.nearest(steps, EARLY * steps[-1])


def quoted(k: int) -> list[int]:
    """Sizes of the leading subspace in the summary, given `k` measured directions.

    Example:
        >>> quoted(8)
        [1, 2, 5, 8]
    """
    return sorted({size for size in _KS if size < k} | {k})


def early_rows(out: Path, moving: Mapping[str, list[int]], k: int) -> pd.DataFrame:
    """Early similarity to the final directions, one row per run, matrix and metric.

    - `early_left_overlap_K`: projector overlap between the leading K directions at 10 % of training
      and the final ones; right likewise
    - `first_left_cosine`: |cos| between u1 of the first snapshot that moved and the final u1
    """
    rows = _averaged(out, [("metric", "in", [*_OVERLAPS, "left_cosine"])])
    pieces = [
        rows[(rows["reference"] == "first") & (rows["metric"] == "left_cosine")].assign(metric="first_left_cosine")
    ]
    for run, steps in moving.items():
        early = rows[(rows["run"] == run) & (rows["reference"] == "final") & rows["metric"].isin(_OVERLAPS)]
        early = early[(early["step"] == early_step(steps)) & early["k"].isin(quoted(k))]
        names = "early_" + early["metric"].astype(str) + "_" + early["k"].astype(str)
        pieces.append(early.assign(metric=names))
    return pd.concat([piece.astype({"metric": str}) for piece in pieces])


def trajectories(
    out: Path, last: pd.DataFrame, moving: Mapping[str, list[int]], seed: int
) -> dict[str, dict[str, Any]]:
    """Run → steps, early step, right-subspace lock over training, EVR against random walks.

    Args:
        last: rows of attention and MLP matrices at the last snapshots.
    """
    rows = _averaged(out, [("metric", "==", "right_overlap"), ("k", "==", 16), ("reference", "==", "final")])
    summaries = {}
    for run, steps in moving.items():
        lock = rows[(rows["run"] == run) & rows["step"].isin(steps)]
        summaries[run] = {
            "steps": steps,
            "early_step": early_step(steps),
            "early_share_of_training": early_step(steps) / steps[-1],
            "overlap_chance": chance(last, run),
            "lock_in_right_16": [
                {"step": int(step), **vars(bootstrap_mean(values["value"], seed=seed))}
                for step, values in lock.groupby("step")
            ],
            "u1_variance_explained": _evr(last, run, seed),
        }
    return summaries


def agreement(out: Path, last: pd.DataFrame, runs: Runs, k: int, seed: int) -> list[dict[str, Any]]:
    """For each pair of runs: overlap of their final leading subspaces, with its chance level."""
    rows = _averaged(out, [("reference", "in", list(runs)), ("metric", "in", _OVERLAPS), ("k", "in", quoted(k))])
    result = []
    for (run, reference), pair in rows.groupby(["run", "reference"], observed=True, sort=False):
        entry: dict[str, Any] = {
            "run": str(run),
            "reference": str(reference),
            "same_group": runs[str(run)]["group"] == runs[str(reference)]["group"],
            "overlap_chance": chance(last, str(run)),
        }
        for metric in _OVERLAPS:
            of_metric = pair[pair["metric"] == metric]
            entry[metric] = {str(size): bootstrap_mean(v, seed=seed) for size, v in of_metric.groupby("k")["value"]}
        result.append(entry)
    return result


def chance(last: pd.DataFrame, run: str) -> dict[str, float]:
    """Means over matrices of 1/M (left) and 1/N (right).

    k times this is the expected overlap of independent random k-dimensional subspaces.
    """
    of_run = last[last["run"] == run]
    sides = {"left": "rows", "right": "columns"}
    return {side: float((1.0 / of_run.loc[of_run["metric"] == size, "value"]).mean()) for side, size in sides.items()}


def _evr(last: pd.DataFrame, run: str, seed: int) -> dict[str, Interval | float] | None:
    of_run = last[last["run"] == run]
    p = of_run.loc[of_run["metric"] == "u1_evr_null_p", "value"].dropna()
    if p.empty:
        return None
    return {
        "observed": bootstrap_mean(of_run.loc[of_run["metric"] == "u1_evr", "value"], seed=seed),
        "random_walk": bootstrap_mean(of_run.loc[of_run["metric"] == "u1_evr_null_mean", "value"], seed=seed),
        "share_of_matrices_beyond_random_walk": float((p < 0.05).mean()),
    }


def _averaged(out: Path, filters: list[tuple[str, str, Any]]) -> pd.DataFrame:
    """Rows of attention and MLP matrices in the `subspaces` table, which holds no vectors."""
    rows = table_queries.with_layer(read_table(out / "subspaces", filters))
    return rows[rows["module"].isin(table_queries.AVERAGED)]
