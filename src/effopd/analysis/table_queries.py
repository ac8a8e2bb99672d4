"""Reading the tables: which rows a summary or a figure is about. Data frames in, data frames out.

Layers outside the layers (embedding, head, final norm) are −1 here, so that they can be index
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

#: What identifies a matrix.
PLACE = ["layer", "module", "matrix"]
#: Modules whose matrices are averaged over.
AVERAGED = ("attention", "mlp")
#: Sizes rather than measurements.
SIZES = ("parameters", "rows", "columns")


def with_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """`layer` as plain integers, −1 outside the layers."""
    return frame.assign(layer=frame["layer"].fillna(-1).astype(int))


def at_step(frame: pd.DataFrame, run: str, step: int | None) -> pd.DataFrame:
    """The rows of one snapshot (`None`: a lone checkpoint that does not say its step)."""
    rows = frame[frame["run"] == run]
    return rows if step is None else rows[rows["step"] == step]


def final(frame: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of each run's last snapshot.

    Args:
        runs: run → at least `steps`, ascending, as in summary.json.
    """
    pieces = [at_step(frame, name, run["steps"][-1]) for name, run in runs.items()]
    return pd.concat(pieces) if pieces else frame.iloc[:0]


def averaged(matrices: pd.DataFrame) -> pd.DataFrame:
    """Rows of attention and MLP matrices; vectors (biases, norms) are left out. A fused matrix is
    one row a part.
    """
    rows = matrices[matrices["module"].isin(AVERAGED)]
    places = rows.loc[rows["metric"] == "rows", PLACE].drop_duplicates()
    keys = pd.MultiIndex.from_frame(places.astype({"module": str, "matrix": str}))
    places = pd.MultiIndex.from_frame(rows[PLACE].astype({"module": str, "matrix": str}))
    return rows[places.isin(keys)]


def by_matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """One column a run, one row a matrix, of rows that hold one value each (one metric, one step a
    run).
    """
    flat = rows.astype({"run": str, "module": str, "matrix": str})
    return flat.pivot(index=PLACE, columns="run", values="value")


def groups_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group → its runs, in the order they were given."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run["group"], []).append(name)
    return groups


def moved_steps(matrices: pd.DataFrame, run: str) -> list[int]:
    """Steps of a run at which anything had moved, ascending; empty for a checkpoint without a
    step.
    """
    rows = matrices[(matrices["run"] == run) & (matrices["metric"] == "frobenius_norm") & (matrices["value"] > 0)]
    return sorted(int(step) for step in rows["step"].dropna().unique())


def nearest(steps: Sequence[int], wanted: float) -> int:
    """The step nearest to `wanted`; the earlier one of two."""
    return min(steps, key=lambda step: (abs(step - wanted), step))
