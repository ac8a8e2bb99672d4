"""Data and drawing helpers shared by the figures of `effopd analyze`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from effopd.analysis import table_queries
from effopd.analysis.tables import read_table
from effopd.common.optional import require
from effopd.common.statistics import Interval, bootstrap_mean, student_t
from effopd.errors import CheckpointError
from effopd.report.style import MUTED, looks

MODULE_COLORS = {
    "embedding": "#e3b95b",
    "attention": "#7f9cc0",
    "mlp": "#3f5878",
    "norm": "#b9a7c7",
    "head": "#c98f6b",
    "other": "#d5d8dd",
}
MODULE_NAMES = {"mlp": "MLP", "norm": "norms"}
#: Matrices of a layer in order of computation.
MATRIX_ORDER = ("q", "k", "v", "o", "router", "gate", "up", "down")
_DRAWS = 500


class Data:
    """The tables and the summary of one analysis.

    Raises:
        CheckpointError: `out` holds no finished analysis.
    """

    def __init__(self, out: Path):
        self.out = Path(out)
        try:
            self.summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{self.out} holds no finished analysis: expected summary.json and tables written by `effopd analyze` "
                f"({error}). Run or resume the analysis first."
            ) from error
        self.runs: dict[str, dict[str, Any]] = self.summary["runs"]
        self.groups = table_queries.groups_of(self.runs)
        self.looks = looks({group: group for group in self.groups})
        self.colors = {group: look.light for group, look in self.looks.items()}
        self.k: int = self.summary["settings"]["k"]

    @cached_property
    def matrices(self) -> pd.DataFrame:
        """The `matrices` table; layers as integers, −1 outside the layers."""
        return table_queries.with_layer(read_table(self.out / "matrices"))

    @cached_property
    def averaged(self) -> pd.DataFrame:
        """Rows of attention and MLP matrices in the `matrices` table."""
        return table_queries.averaged(self.matrices)

    @cached_property
    def at_rest(self) -> pd.Series:
        """Mask of the rows of `averaged` at which a run with a trajectory had not moved yet."""
        moved = {(run, step) for runs in self.moving.values() for run in runs for step in self.steps(run)}
        keys = zip(self.averaged["run"].astype(str), self.averaged["step"], strict=True)
        tracked = {run for runs in self.moving.values() for run in runs}
        return pd.Series([run in tracked and (run, step) not in moved for run, step in keys], self.averaged.index)

    def steps(self, run: str) -> list[int]:
        """Steps of a trajectory with a nonzero update."""
        return self.runs[run]["trajectory"]["steps"]

    @cached_property
    def last(self) -> pd.DataFrame:
        """Rows of `averaged` at each run's last snapshot."""
        return table_queries.final(self.averaged, self.runs)

    def table(self, name: str, filters: Sequence[tuple[str, str, Any]] | None = None) -> pd.DataFrame:
        """A table by name, with layers as integers."""
        return table_queries.with_layer(read_table(self.out / name, filters))

    def has(self, metric: str) -> bool:
        """Whether a metric was measured and is defined in some row."""
        rows = self.matrices[self.matrices["metric"] == metric]
        return bool(rows["value"].notna().any())

    @property
    def moving(self) -> dict[str, list[str]]:
        """Groups, reduced to runs with a trajectory of at least two snapshots that moved."""
        moving = {g: [r for r in runs if self.runs[r]["trajectory"]] for g, runs in self.groups.items()}
        return {group: runs for group, runs in moving.items() if runs}

    def label(self, group: str) -> str:
        """The group's name, with the number of seeds if there are several."""
        size = len(self.groups[group])
        return group if size == 1 else f"{group} ({size} seeds)"

    def band(self, group: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Mean and 95 % interval at each step, over seeds if there are several, otherwise matrices.

        Only `complete_steps` are used, because the mean jumps at a step where a seed ends.

        Args:
            rows: one value per run, step and matrix (columns run, step, value).

        Returns:
            columns mean, low, high; index step.
        """
        intervals: dict[int, Interval] = {}
        for step, values in complete_steps(rows).groupby("step"):
            if len(self.groups[group]) > 1:
                intervals[int(step)] = student_t(values.groupby("run", observed=True)["value"].mean())
            else:
                intervals[int(step)] = bootstrap_mean(values["value"], _DRAWS)
        table = pd.DataFrame(
            {step: vars(estimate) for step, estimate in intervals.items()}, index=["mean", "low", "high"]
        )
        return table.T.astype(float).dropna(subset=["mean"])

    def interval(self, group: str, metric: str) -> Interval:
        """The group's final mean of a metric with its interval, from the summary."""
        values = self.summary["groups"][group]["metrics"].get(metric) or {}
        mean, low, high = (np.nan if values.get(key) is None else values[key] for key in ("mean", "low", "high"))
        return Interval(mean, low, high, values.get("n", 0))


def complete_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows at the steps with the largest number of runs, which is usually all of them."""
    runs = rows.groupby("step")["run"].transform("nunique")
    return rows[runs == runs.max()]


def matrix_rank(matrix: str) -> tuple[int, str]:
    """Sort key: matrices in order of computation, unknown ones last."""
    last = matrix.rpartition(".")[2]
    return (MATRIX_ORDER.index(last) if last in MATRIX_ORDER else len(MATRIX_ORDER), matrix)


def short_matrix(matrix: str) -> str:
    """Name without the expert's index: `experts.3.gate` → `experts.gate`."""
    return re.sub(r"\.\d+(?=\.)", "", matrix)


def figure_of(columns: int, rows: int = 1, width: float = 3.4, height: float = 2.9, **options: Any):
    """A figure and its axes (always a 2-D array)."""
    figure = empty_figure(width * columns, height * rows)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def empty_figure(width: float, height: float):
    """A figure without axes, size in inches; made without pyplot to keep a notebook's backend."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def bare(axis) -> None:
    """Remove ticks, grid and spines."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def end_labels(axis, labels: Sequence[tuple[float, float, str, str]], gap: float = 0.075) -> None:
    """Write labels (x, y, text, color) at the ends of lines, moved apart to avoid overlap."""
    to_axes = axis.transData + axis.transAxes.inverted()
    placed = sorted(((to_axes.transform((x, y))[1], x, y, text, color) for x, y, text, color in labels))
    heights = spread([item[0] for item in placed], gap)
    for height, (_, x, _, text, color) in zip(heights, placed, strict=True):
        axis.annotate(
            text,
            xy=(x, height),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=color,
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved apart to at least `gap`; the mean of each cluster is kept.

    Example:
        >>> spread([0.5, 0.5], 0.25)
        [0.375, 0.625]
    """
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1:
            below, above = clusters[-2], clusters[-1]
            reach = gap * (len(below) + len(above)) / 2
            if np.mean(above) - np.mean(below) >= reach - 1e-12:
                break
            clusters[-2:] = [below + above]
    return [
        float(np.mean(cluster) + gap * (i - (len(cluster) - 1) / 2))
        for cluster in clusters
        for i in range(len(cluster))
    ]


def lines_over_steps(axis, data: Data, rows: pd.DataFrame) -> None:
    """Draw each group's mean over training with its interval, and thin lines for single seeds.

    A group without a trajectory is a dashed line at its final value.

    Args:
        rows: one value per run, step and matrix (columns run, step, value).
    """
    labels, extent = [], []
    right = max(steps[-1] for runs in data.moving.values() for steps in map(data.steps, runs))
    for group, runs in data.groups.items():
        color, moving = data.colors[group], data.moving.get(group)
        of_group = rows[rows["run"].isin(moving or runs)]
        if moving:
            band = data.band(group, of_group)
            if band.empty:
                continue
            extent += [*_single_seeds(axis, of_group, moving, color), *band["mean"]]
            extent += [] if len(moving) > 1 else [*band["low"], *band["high"]]
            axis.fill_between(band.index, band["low"], band["high"], color=color, alpha=0.15, linewidth=0)
            axis.plot(band.index, band["mean"], color=color, linewidth=2)
            y = float(band["mean"].iloc[-1])
        else:
            y = float(table_queries.final(of_group, {run: data.runs[run] for run in runs})["value"].mean())
            axis.axhline(y, color=color, linewidth=1.4, linestyle=(0, (5, 3)))
            extent.append(y)
        labels.append((float(right), y, data.label(group), color))
    limit_y(axis, extent)
    axis.set_xlabel("step")
    end_labels(axis, [label for label in labels if np.isfinite(label[1])])


def _single_seeds(axis, rows: pd.DataFrame, runs: Sequence[str], color: str) -> list[float]:
    """Draw one thin line per seed if there are several; return the drawn values."""
    drawn: list[float] = []
    for run in runs if len(runs) > 1 else ():
        line = rows[rows["run"] == run].groupby("step")["value"].mean()
        axis.plot(line.index.astype(int), line.to_numpy(), color=color, linewidth=0.7, alpha=0.45)
        drawn += line.to_list()
    return drawn


def limit_y(axis, values: Sequence[float]) -> None:
    """Set the y limits from the lines, not their intervals, which can be huge for two seeds."""
    finite = np.asarray([v for v in values if np.isfinite(v)])
    if len(finite):
        low, high = float(finite.min()), float(finite.max())
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - margin if low < 0 or low - margin > 0 else min(0.0, low), high + margin)


def strips(axis, data: Data, rows: pd.DataFrame, metric: str, extra: tuple[str, str] | None = None) -> None:
    """Draw a metric's distribution over matrices, one column per group, with mean and interval.

    Values are averaged over seeds. Attention matrices are circles, MLP matrices triangles.

    Args:
        extra: (metric, name) of a reference in a gray column, such as the noise floor.
    """
    wide = table_queries.by_matrix(rows[rows["metric"] == metric])
    columns = [
        (group, wide.reindex(columns=runs).mean(axis=1), data.colors[group]) for group, runs in data.groups.items()
    ]
    if extra is not None:
        columns.append((extra[1], table_queries.by_matrix(rows[rows["metric"] == extra[0]]).mean(axis=1), MUTED))
    everything = pd.concat([values for _, values, _ in columns]).dropna()
    if len(everything) and everything.min() > 0 and everything.max() > 30 * everything.min():
        axis.set_yscale("log")
    for x, (group, values, color) in enumerate(columns):
        modules = values.index.get_level_values("module")
        for module, marker in (("attention", "o"), ("mlp", "^")):
            of_module = values[modules == module].dropna()
            jitter = np.random.default_rng(0).uniform(-0.13, 0.13, len(of_module))
            size = float(np.clip(900 / max(1, len(values)), 3, 16))
            axis.scatter(x - 0.1 + jitter, of_module, s=size, marker=marker, color=color, alpha=0.45, linewidth=0)
        estimate = data.interval(group, metric) if group in data.groups else bootstrap_mean(values, _DRAWS)
        axis.plot([x + 0.22] * 2, [estimate.low, estimate.high], color=color, linewidth=2.2, solid_capstyle="butt")
        axis.plot([x + 0.22], [estimate.mean], marker="D", color=color, markersize=5)
        axis.annotate(
            f"{estimate.mean:.3g}", (x + 0.22, estimate.mean), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8, color=color,
        )  # fmt: skip
    axis.set_xticks(range(len(columns)), [name for name, _, _ in columns])
    axis.set_xlim(-0.5, len(columns) - 0.35)
    axis.grid(axis="x", visible=False)
