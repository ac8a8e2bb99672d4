"""Building blocks of the intervention figures: grids, lines with bands, error bars, legend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effopd.report.style import INK

BASE_COLOR = INK
LABELS = {
    "accuracy": "accuracy",
    "kl": "reverse KL to the teacher\n(nats per token)",
    "update_norm": "‖ΔW‖ of the model evaluated",
}


def grid(plt, rows: int, columns: int, width: float = 4.6, **share: Any):
    """Figure and axes of rows × columns panels with a light grid and no box."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 0.6, 3.3 * rows + 0.4),
        squeeze=False,
        constrained_layout=True,
        **share,
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure, axes


def groups_of(rows: pd.DataFrame) -> list[str]:
    """The groups of a table, in table order."""
    return list(dict.fromkeys(rows["group"]))


def draw_reference(axis, table: pd.DataFrame, metric: str, colors: dict[str, str], vertical: bool = False) -> None:
    """Draw reference lines: the base, and each group's trained model (mean over its seeds)."""
    across = axis.axvline if vertical else axis.axhline
    rows = table[table["intervention"] == "reference"]
    for group, seeds in rows.groupby("group", sort=False):
        color = BASE_COLOR if group == "base" else colors.get(group)
        if color is not None:
            label = "base" if group == "base" else f"{group}, trained"
            across(seeds[metric].mean(), color=color, linestyle=":", linewidth=1.2, label=label, zorder=1)


def summarized(rows: pd.DataFrame, key: str, metric: str, x: str | None = None) -> pd.DataFrame:
    """Columns x, mean, low, high; one row per value of `key`.

    low and high are the range over seeds, or the interval over prompts of a single seed.
    """
    out = []
    for value, seeds in rows.groupby(key, sort=True):
        values = seeds[metric].astype(float)
        low, high = values.min(), values.max()
        if len(seeds) == 1:
            low, high = (float(seeds[f"{metric}_{end}"].iloc[0]) for end in ("low", "high"))
        where = float(seeds[x].mean()) if x else float(value)
        out.append({"x": where, "mean": values.mean(), "low": low, "high": high})
    return pd.DataFrame(out, columns=["x", "mean", "low", "high"], dtype=float)


def draw_line(axis, summary: pd.DataFrame, color: str, label: str, **style: Any) -> None:
    """Draw a line with its band."""
    axis.plot(summary.x, summary["mean"], color=color, label=label, **({"marker": "o", "markersize": 4} | style))
    axis.fill_between(summary.x, summary.low, summary.high, color=color, alpha=0.13, linewidth=0)


def draw_points(axis, positions, summary: pd.DataFrame, color: str, label: str, horizontal: bool = False) -> None:
    """Draw points with error bars."""
    error = np.clip([summary["mean"] - summary.low, summary.high - summary["mean"]], 0, None)
    style = {"fmt": "o", "color": color, "label": label, "capsize": 3, "markersize": 5}
    if horizontal:
        axis.errorbar(summary["mean"], positions, xerr=error, **style)
    else:
        axis.errorbar(positions, summary["mean"], yerr=error, **style)


def finished(figure, axes, table: pd.DataFrame, title: str) -> Any:
    """Add one legend below all panels, and a title that explains bands and error bars."""
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label:
                handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), frameon=False
    )
    seeds = table["run"].nunique() > table["group"].nunique()
    bands = "95 % interval over prompts"
    bands = f"mean over seeds with their range; one seed: {bands}" if seeds else bands
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 0.995, f"\n\n{int(table['n'].max())} prompts; {bands}", ha="center", va="top", fontsize=8.5)
    return figure
