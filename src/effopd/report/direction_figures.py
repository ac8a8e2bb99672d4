"""Figures of update directions: similarity to the final ones, path of u1, agreement of runs.

    subspaces_left.png, subspaces_right.png
                                similarity to the final leading directions   (paper: figure 4b)
    first_last.png              |cos(u1(first), u1(last))| by layer, matrix  (paper: figure 4b)
    u1_path.png, u1_tsne.png    the path of u1 in a plane                    (paper: figure 4a)
    agreement.png               final directions of different runs

Drawn by `dynamics_figures.draw`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from effopd.analysis import table_queries
from effopd.common.optional import require
from effopd.common.statistics import bootstrap_mean
from effopd.report.dynamics_data import (
    Data,
    bare,
    complete_steps,
    end_labels,
    figure_of,
    matrix_rank,
    short_matrix,
)
from effopd.report.style import INK, MUTED, save


def subspaces(data: Data, path: Path, side: str) -> Path | None:
    """Similarity of step t and the final step for k = 1 … K: cosine, projector overlap, angle."""
    moving = data.moving
    readings = {
        f"{side}_cosine": "k-th direction with its\ncounterpart: |cos|",
        f"{side}_overlap": "leading-k subspaces:\nprojector overlap",
        f"{side}_angle_max": "leading-k subspaces:\nlargest angle (°)",
    }
    if not moving or "subspaces" not in data.summary["settings"]["metrics"]:
        return None
    rows = data.table("subspaces", [("reference", "==", "final"), ("metric", "in", list(readings))])
    rows = rows[rows["module"].isin(table_queries.AVERAGED)].dropna(subset=["value"])
    if rows.empty:
        return None
    figure, axes = figure_of(len(moving), 3, width=4.2, height=2.5, sharex="col", sharey="row")
    largest = int(rows["k"].max())
    colormap = _dark_to_light()
    for column, (group, runs) in enumerate(moving.items()):
        of_group = rows[rows["run"].isin(runs)]
        for row, (metric, name) in enumerate(readings.items()):
            axis = axes[row][column]
            _fan(axis, data, group, of_group[of_group["metric"] == metric], largest, colormap)
            if metric.endswith("overlap"):
                _chance_lines(axis, data, runs, side, largest)
            early = data.runs[runs[0]]["trajectory"]["steps"][-1] * 0.1
            axis.axvline(early, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            axis.set_ylim((0, 92) if "angle" in metric else (0, 1.02))
            if column == 0:
                axis.set_ylabel(name)
        axes[0][column].set_title(data.label(group), color=data.colors[group], fontweight="bold", pad=12)
        axes[0][column].annotate(
            "10 % of training", (early, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7, color=MUTED
        )
        axes[2][column].set_xlabel("step")
    scale = require("matplotlib.cm").ScalarMappable(require("matplotlib.colors").Normalize(1, largest), colormap)
    ticks = sorted({1, *range(5, largest, 5), largest})
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.02, ticks=ticks)
    bar.ax.set_title("k", fontsize=9)
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)
    over = "seeds" if any(len(r) > 1 for r in moving.values()) else "matrices"
    note = (
        f"Means over attention and MLP matrices. Shaded, for k = 1 and k = {largest}: 95 % interval over {over}. "
        f"Dotted: chance for k = {largest}. The last step is compared with itself."
    )
    return save(figure, path, f"{side.capitalize()} singular directions of the update: similarity to the final", note)


def _dark_to_light():
    """Colormap from dark (k = 1) to light but legible on white (k = K)."""
    colors = require("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.9, 256))
    return require("matplotlib.colors").ListedColormap(colors)


def _fan(axis, data: Data, group: str, rows: pd.DataFrame, largest: int, colormap) -> None:
    """One line per k; the first and the last bold, with their intervals shaded."""
    lines = complete_steps(rows).groupby(["k", "step"])["value"].mean().unstack("k")
    for k in lines.columns:
        shade = colormap((int(k) - 1) / max(1, largest - 1))
        outer = k in (1, largest)
        axis.plot(
            lines.index.astype(int), lines[k], color=shade, linewidth=2.2 if outer else 0.8, zorder=3 if outer else 2
        )
        if outer:
            band = data.band(group, rows[rows["k"] == k])
            axis.fill_between(band.index, band["low"], band["high"], color=shade, alpha=0.18, linewidth=0)


def _chance_lines(axis, data: Data, runs: Sequence[str], side: str, largest: int) -> None:
    chance = largest * data.runs[runs[0]]["trajectory"]["overlap_chance"][side]
    axis.axhline(chance, color=MUTED, linewidth=1, linestyle=":")


def first_last(data: Data, path: Path) -> Path | None:
    """Heat map of |cos(u1(first), u1(last))|, layer by matrix, averaged over seeds."""
    if not data.moving or "subspaces" not in data.summary["settings"]["metrics"]:
        return None
    rows = data.table("subspaces", [("reference", "==", "first"), ("metric", "==", "left_cosine")])
    rows = rows[rows["module"].isin(table_queries.AVERAGED) & (rows["layer"] >= 0)]
    if rows.empty:
        return None
    rows = rows.assign(matrix=rows["matrix"].astype(str).map(short_matrix))
    order = list(dict.fromkeys(zip(rows["module"].astype(str), rows["matrix"], strict=True)))
    order.sort(key=lambda key: (table_queries.AVERAGED.index(key[0]), matrix_rank(key[1])))
    names = [matrix for _, matrix in order]
    layers = sorted(rows["layer"].unique())
    height = float(np.clip(0.34 * len(layers) + 1.2, 2.4, 9.0))
    figure, axes = figure_of(len(data.moving), width=max(3.0, 0.55 * len(names) + 0.8), height=height, sharey=True)
    for axis, (group, runs) in zip(axes[0], data.moving.items(), strict=True):
        of_group = rows[rows["run"].isin(runs)]
        table = (
            of_group.groupby(["layer", "module", "matrix"], observed=True)["value"]
            .mean()
            .unstack(["module", "matrix"])
        )
        grid = table.reindex(index=layers, columns=pd.MultiIndex.from_tuples(order)).to_numpy(dtype=float)
        image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", origin="lower")
        if len(layers) <= 16:
            for (i, j), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                              color="white" if value > 0.6 else INK)  # fmt: skip
        axis.set_xticks(range(len(names)), names, rotation=0 if len(max(names, key=len)) <= 5 else 45)
        axis.set_yticks(range(len(layers))[:: max(1, len(layers) // 12)], layers[:: max(1, len(layers) // 12)])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_title(data.label(group), color=data.colors[group], fontweight="bold")
    axes[0][0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.02)
    bar.outline.set_visible(False)
    first = sorted({run["trajectory"]["steps"][0] for run in data.runs.values() if run["trajectory"]})
    note = f"First snapshot that moved: step {', '.join(map(str, first))}. Means over seeds if there are several."
    return save(figure, path, "|cos(u1(first), u1(last))|: similarity of the first and last leading direction", note)


def u1_path(data: Data, path: Path) -> Path | None:
    """Path of u1 in its PCA plane for a few matrices; explained variance of all matrices."""
    return _paths(data, path, "pc", "The path of the leading left direction u1", explained=True)


def u1_tsne(data: Data, path: Path) -> Path | None:
    """Path of u1 as t-SNE pictures; distances in them mean little."""
    return _paths(data, path, "tsne", "The path of u1 as a t-SNE picture (distances mean little)", explained=False)


def _paths(data: Data, path: Path, kind: str, title: str, explained: bool) -> Path | None:
    if not data.moving or "directions" not in data.summary["settings"]["metrics"]:
        return None
    rows = data.table("directions")
    places = pictured(rows, kind)
    if not places:
        return None
    groups = {group: runs[0] for group, runs in data.moving.items()}
    figure, axes = figure_of(len(places) + explained, len(groups), width=2.7, height=2.6)
    for (row, (group, run)), (column, place) in itertools.product(enumerate(groups.items()), enumerate(places)):
        layer, module, matrix = place
        of_run = rows[
            (rows["run"] == run) & (rows["layer"] == layer) & (rows["module"] == module) & (rows["matrix"] == matrix)
        ]
        xy = of_run[of_run["metric"].isin((f"{kind}1", f"{kind}2"))].pivot(
            index="step", columns="metric", values="value"
        )
        _path(axes[row][column], xy, data.colors[group])
        if row == 0:
            axes[row][column].set_title(f"layer {layer}, {matrix}")
        if explained:
            values = data.matrices[
                (data.matrices["run"] == run)
                & (data.matrices["layer"] == layer)
                & (data.matrices["module"] == module)
                & (data.matrices["matrix"] == matrix)
            ]
            evr, null = (values.loc[values["metric"] == m, "value"].mean() for m in ("u1_evr", "u1_evr_null_mean"))
            shares = (
                f"two components: {evr:.0%}  (random walk {null:.0%})" if evr == evr else "fewer than three points"
            )
            axes[row][column].set_xlabel(shares, color=MUTED, fontsize=7.5)
        if column == 0:
            axes[row][0].set_ylabel(run, color=data.colors[group], fontweight="bold")
    if explained:
        _explained(axes, data, groups)
    note = "Open circle: first snapshot, filled: last."
    if explained:
        note += " Right, gray: random walks with the same step lengths, which are nearly planar too."
    return save(figure, path, title, note)


def pictured(rows: pd.DataFrame, kind: str) -> list[tuple[int, str, str]]:
    """One attention and one MLP matrix of the first and last layer, with t-SNE pictures if any."""
    chosen = rows[rows["metric"] == "tsne1"]
    if chosen.empty and kind == "pc":
        chosen = rows[(rows["metric"] == "pc1") & rows["module"].isin(table_queries.AVERAGED)]
    columns = (chosen["layer"], chosen["module"].astype(str), chosen["matrix"].astype(str))
    places = sorted(
        set(zip(*columns, strict=True)), key=lambda place: (table_queries.AVERAGED.index(place[1]), place[0], place[2])
    )
    by_module = [[place for place in places if place[1] == module] for module in table_queries.AVERAGED]
    return [
        place for of_module in by_module for place in dict.fromkeys((of_module[0], of_module[-1]) if of_module else ())
    ]


def _path(axis, xy: pd.DataFrame, color: str) -> None:
    points = xy.to_numpy(dtype=float)
    bare(axis)
    if not len(points):
        return
    for i in range(len(points) - 1):
        share = (i + 1) / len(points)
        axis.plot(*points[i : i + 2].T, color=color, linewidth=1.6, alpha=0.25 + 0.75 * share, solid_capstyle="round")
    axis.scatter(*points.T, s=10, color=color, zorder=3, linewidth=0)
    axis.scatter(*points[0], s=46, facecolor="white", edgecolor=color, linewidth=1.5, zorder=4)
    axis.scatter(*points[-1], s=46, color=color, zorder=4)
    axis.annotate(str(xy.index[0]), points[0], xytext=(6, 4), textcoords="offset points", fontsize=7, color=MUTED)
    axis.annotate(str(xy.index[-1]), points[-1], xytext=(6, 4), textcoords="offset points", fontsize=7, color=MUTED)
    axis.margins(0.15)


def _explained(axes, data: Data, groups: dict[str, str]) -> None:
    """Explained variance of every matrix, compared with random walks."""
    shown = data.last.loc[data.last["metric"].isin(("u1_evr", "u1_evr_null_mean")), "value"].dropna()
    for row, group in enumerate(groups):
        axis = axes[row][-1]
        of_group = data.last[data.last["run"].isin(data.moving[group])]
        for x, (metric, color) in enumerate((("u1_evr", data.colors[group]), ("u1_evr_null_mean", MUTED))):
            values = table_queries.by_matrix(of_group[of_group["metric"] == metric]).mean(axis=1).dropna()
            if values.empty:
                continue
            jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
            axis.scatter(x + jitter, values, s=9, color=color, alpha=0.5, linewidth=0)
            axis.plot([x - 0.25, x + 0.25], [values.mean()] * 2, color=color, linewidth=2)
            axis.annotate(f"{values.mean():.2f}", (x + 0.27, values.mean()), fontsize=8, color=color, va="center")
        axis.set_xticks((0, 1), ("u1", "random\nwalk"))
        axis.set_xlim(-0.5, 1.75)
        if row == 0:
            axis.set_title("all matrices")
        if len(shown):
            axis.set_ylim(float(shown.min()) - 0.02, float(shown.max()) + 0.02)
        axis.set_ylabel("variance explained by\ntwo components")


def agreement(data: Data, path: Path) -> Path | None:
    """Overlap of the final leading subspaces of different runs, k = 1 … K, with chance level."""
    if len(data.runs) < 2 or "subspaces" not in data.summary["settings"]["metrics"]:
        return None
    wanted = ["left_overlap", "right_overlap"]
    rows = data.table("subspaces", [("reference", "in", list(data.runs)), ("metric", "in", wanted)])
    rows = rows[rows["module"].isin(table_queries.AVERAGED)].dropna(subset=["value"])
    if rows.empty:
        return None
    group = {run: values["group"] for run, values in data.runs.items()}
    kinds = [f"{group[str(a)]} – {group[str(b)]}" for a, b in zip(rows["run"], rows["reference"], strict=True)]
    rows = rows.assign(kind=kinds)
    figure, axes = figure_of(2, width=4.6, height=3.3, sharey=True)
    sizes = {"left_overlap": "rows", "right_overlap": "columns"}
    for axis, metric in zip(axes[0], wanted, strict=True):
        labels = []
        for i, (kind, of_kind) in enumerate(rows[rows["metric"] == metric].groupby("kind", sort=False)):
            one, other = kind.split(" – ")
            color = data.colors[one] if one == other else ("#6a4c7d", "#4f6d5a", "#8a6d3b")[i % 3]
            line, low, high = over_pairs(of_kind)
            axis.fill_between(line.index.astype(int), low, high, color=color, alpha=0.14, linewidth=0)
            axis.plot(line.index.astype(int), line, color=color, linewidth=2, linestyle="-" if one == other else "--")
            labels.append(
                (float(line.index[-1]), float(line.iloc[-1]), f"{kind}{' (seeds)' if one == other else ''}", color)
            )
        chance = float((1 / data.last.loc[data.last["metric"] == sizes[metric], "value"]).mean())
        ks = np.array(sorted(rows["k"].unique()), dtype=float)
        axis.plot(ks, ks * chance, color=MUTED, linewidth=1, linestyle=":")
        labels.append((float(ks[-1]), float(ks[-1] * chance), "chance", MUTED))
        axis.set_ylim(0, 1.0)
        axis.set_xlabel("k")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{metric.split('_')[0]} singular directions")
        end_labels(axis, labels)
    axes[0][0].set_ylabel("overlap of the leading-k subspaces")
    note = (
        "Last snapshot of each run. Means over attention and MLP matrices with 95 % intervals over matrices; pairs of "
        "seeds are averaged first."
    )
    return save(figure, path, "Agreement of different runs: overlap of their final leading subspaces", note)


def over_pairs(rows: pd.DataFrame):
    """Mean over matrices for each k, with bootstrap intervals; pairs of runs are averaged first."""
    per_matrix = rows.groupby(["k", *table_queries.PLACE], observed=True)["value"].mean()
    estimates = {k: bootstrap_mean(values, 500) for k, values in per_matrix.groupby("k")}
    line = pd.Series({k: estimate.mean for k, estimate in estimates.items()})
    return line, [e.low for e in estimates.values()], [e.high for e in estimates.values()]


FIGURES: dict[str, Callable[[Data, Path], Path | None]] = {
    "subspaces_left": lambda data, path: subspaces(data, path, "left"),
    "subspaces_right": lambda data, path: subspaces(data, path, "right"),
    "first_last": first_last,
    "u1_path": u1_path,
    "u1_tsne": u1_tsne,
    "agreement": agreement,
}
