"""Terminal table of the results of one intervention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table


def intervention_table(frame: pd.DataFrame, intervention: str, coordinates: Sequence[str]) -> Table:
    """One row per point, after the rows of the base and the trained models.

    Coordinates with the same value in all points move to the title.

    Args:
        frame: the results of a folder (see `effopd.interventions.results`).
        coordinates: columns that identify the points of this intervention.
    """
    points = frame[frame["intervention"] == intervention]
    rows = frame[frame["intervention"].isin(["reference", intervention])]
    constant = [name for name in coordinates if points[name].nunique() == 1 and len(points) > 1]
    varying = [name for name in coordinates if name not in constant]
    change, heading = _change_column(intervention)
    with_kl = "kl" in rows and rows["kl"].notna().any()
    fixed = [f"{name} {_cell(points[name].iloc[0])}" for name in constant]
    facts = ", ".join([f"{int(rows['n'].iloc[0])} prompts", *fixed])
    table = Table(title=f"{intervention}: {facts}", box=None, header_style="bold", pad_edge=False)
    for name in ("run", *varying):
        table.add_column(name, justify="left", no_wrap=True)
    for name in ("‖W − W0‖", "accuracy [95 %]", heading, *(["KL to the teacher"] if with_kl else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        numbers = [f"{row['update_norm']:.4g}", _interval(row, "accuracy", ".3f"), _interval(row, change, "+.3f")]
        kl = [_interval(row, "kl", ".4f")] if with_kl else []
        table.add_row(*_names(row, varying), *numbers, *kl)
    return table


def _change_column(intervention: str) -> tuple[str, str]:
    """Column of the reported change and its heading; `embedding` edits the trained model."""
    if intervention == "embedding":
        return "change_from_trained", "change from trained"
    return "accuracy_change", "change from base"


def _names(row: pd.Series, varying: Sequence[str]) -> list[str]:
    """Run and coordinates of a row; the base and the trained models have no coordinates."""
    if row["intervention"] != "reference":
        return [row["run"], *(_cell(row[name]) for name in varying)]
    run = row["run"] if row["run"] == "base" else f"{row['run']}, trained"
    return [run, *("" for _ in varying)]


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(row: pd.Series, name: str, form: str) -> str:
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
