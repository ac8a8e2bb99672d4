"""Queries on the tables of an analysis: select the rows that a summary or a figure needs.

Parts outside the layers (embedding, head, final norm) have `layer` −1, so that `layer` can be an
index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

#: Columns that identify a matrix.
PLACE = ["layer", "module", "matrix"]
#: Modules whose matrices enter the means.
AVERAGED = ("attention", "mlp")
#: Sizes rather than measurements.
SIZES = ("parameters", "rows", "columns")


def with_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with `layer` as plain integers, −1 outside the layers."""
    return frame.assign(layer=frame["layer"].fillna(-1).astype(int))


def at_step(frame: pd.DataFrame, run: str, step: int | None) -> pd.DataFrame:
    """Rows of one snapshot. `None`: a single checkpoint without a known step."""
    rows = frame[frame["run"] == run]
    return rows if step is None else rows[rows["step"] == step]


def final(frame: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of each run's last snapshot.

    Args:
        runs: run → at least `steps`, ascending, as in summary.json.
    """
    pieces = [at_step(frame, name, run["steps"][-1]) for name, run in runs.items()]
    return pd.concat(pieces) if pieces else frame.iloc[:0]


def averaged(matrices: pd.DataFrame) -> pd.DataFrame:
    """Rows of attention and MLP matrices, without vectors; fused matrices have one row per part."""
    rows = matrices[matrices["module"].isin(AVERAGED)]
    places = rows.loc[rows["metric"] == "rows", PLACE].drop_duplicates()
    keys = pd.MultiIndex.from_frame(places.astype({"module": str, "matrix": str}))
    places = pd.MultiIndex.from_frame(rows[PLACE].astype({"module": str, "matrix": str}))
    return rows[places.isin(keys)]


def by_matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """Pivot to one row per matrix and one column per run.

    Args:
        rows: one metric, one step per run.
    """
    flat = rows.astype({"run": str, "module": str, "matrix": str})
    return flat.pivot(index=PLACE, columns="run", values="value")


def groups_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group → its runs, in the order given."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run["group"], []).append(name)
    return groups


def moved_steps(matrices: pd.DataFrame, run: str) -> list[int]:
    """Steps of a run with a nonzero update, ascending; empty for a checkpoint without a step."""
    rows = matrices[(matrices["run"] == run) & (matrices["metric"] == "frobenius_norm") & (matrices["value"] > 0)]
    return sorted(int(step) for step in rows["step"].dropna().unique())


def nearest(steps: Sequence[int], wanted: float) -> int:
    """The step nearest to `wanted`; the earlier one of a tie."""
    return min(steps, key=lambda step: (abs(step - wanted), step))
