"""Figures of interventions, drawn from the table of `effopd.interventions.results` alone.

One function per intervention. Runs of one label are seeds: a line is their mean, a band reaches
from the lowest to the highest seed. With one seed, the band is the 95 % interval over prompts. The
KL to a teacher, if measured, has its own panels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from effopd.common.optional import require
from effopd.report.intervention_panels import (
    BASE_COLOR,
    LABELS,
    draw_line,
    draw_points,
    draw_reference,
    finished,
    grid,
    groups_of,
    summarized,
)
from effopd.report.linearity_figure import linearity_figure
from effopd.report.style import group_colors


def draw(table: pd.DataFrame, intervention: str, path: Path) -> Path:
    """Draw the figure of an intervention to `path` (PNG).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    metrics = ["accuracy", *(["kl"] if "kl" in table and table["kl"].notna().any() else [])]
    figure = FIGURES[intervention](plt, table, metrics)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves(
    plt, table: pd.DataFrame, metrics: list[str], intervention: str, key: str, xs: dict[str | None, str], title: str
):
    """One line per group: metrics (rows of panels) against several x axes (columns)."""
    rows = table[table["intervention"] == intervention]
    colors = group_colors(groups_of(rows))
    figure, axes = grid(plt, len(metrics), len(xs), sharey="row", sharex="col")
    for i, metric in enumerate(metrics):
        for j, (x, label) in enumerate(xs.items()):
            axis = axes[i][j]
            for group, color in colors.items():
                draw_line(
                    axis, summarized(rows[rows["group"] == group], key, metric, x).sort_values("x"), color, group
                )
            draw_reference(axis, table, metric, colors)
            axes[-1][j].set_xlabel(label)
        axes[i][0].set_ylabel(LABELS[metric])
    return finished(figure, axes, table, title)


def alpha_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 1a: the straight line from the base to the trained model."""
    xs = {"update_norm": "‖αΔW‖", None: "α"}
    return _curves(plt, table, metrics, "alpha", "alpha", xs, "Along the update: W0 + αΔW")


def trajectory_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 1b: saved steps of training."""
    xs = {"update_norm": "‖ΔW_t‖", None: "optimizer step t"}
    return _curves(plt, table, metrics, "trajectory", "step", xs, "Along training: W_t")


def embedding_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 2a: trained models with the base's embeddings."""
    rows = table[table["intervention"] == "embedding"]
    colors = group_colors(groups_of(rows))
    kinds = ["base", "trained", *dict.fromkeys(rows["replaced"])]
    figure, axes = grid(plt, 1, len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (group, color) in enumerate(colors.items()):
            reference = table[(table["intervention"] == "reference") & (table["group"] == group)]
            both = pd.concat([reference.assign(replaced="trained"), rows[rows["group"] == group]])
            summary = summarized(both.assign(kind=both["replaced"].map(kinds.index)), "kind", metric)
            draw_points(axis, summary.x + 0.12 * (i - (len(colors) - 1) / 2), summary, color, group)
        base = table[(table["intervention"] == "reference") & (table["group"] == "base")].assign(kind=0)
        draw_points(axis, [0], summarized(base, "kind", metric), BASE_COLOR, "base")
        names = [kind if kind in kinds[:2] else f"trained, with\nthe base's {kind}" for kind in kinds]
        axis.set_xticks(range(len(kinds)), names)
        axis.margins(x=0.15)
        axis.set_ylabel(LABELS[metric])
    return finished(figure, axes, table, "Embedding replacement")


def window_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 2b: windows of trained layers in the base, with norms per layer below."""
    rows = table[table["intervention"] == "window"]
    colors, modules = group_colors(groups_of(rows)), [m for m in ("mlp", "attention") if (rows["module"] == m).any()]
    figure, axes = grid(plt, len(metrics) + 1, len(modules), sharex=True, sharey="row")
    for j, module in enumerate(modules):
        for k, (group, color) in enumerate(colors.items()):
            selected = rows[(rows["group"] == group) & (rows["module"] == module)]
            for i, metric in enumerate(metrics):
                draw_line(axes[i][j], summarized(selected, "center", metric), color, group)
            norms = selected.groupby("center")["layer_norm"].mean()
            width = 0.8 / len(colors)
            shift = width * (k - (len(colors) - 1) / 2)
            axes[-1][j].bar(norms.index.to_numpy(float) + shift, norms.to_numpy(float), width, color=color, alpha=0.7)
        for i, metric in enumerate(metrics):
            draw_reference(axes[i][j], table, metric, colors)
            axes[i][0].set_ylabel(LABELS[metric])
        half = int(rows["half_width"].iloc[0])
        where = f" of layers l−{half} … l+{half}" if half else " of layer l"
        axes[0][j].set_title({"mlp": "MLP", "attention": "attention"}[module] + where)
        axes[-1][j].set_xlabel("center layer l")
        axes[-1][j].xaxis.get_major_locator().set_params(integer=True)
    axes[-1][0].set_ylabel("‖ΔW‖ of layer l")
    return finished(figure, axes, table, "Windows of trained layers in the base")


def swap_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Each module and layer: only it trained, and all but it trained."""
    rows = table[table["intervention"] == "swap"]
    colors, units = group_colors(groups_of(rows)), list(dict.fromkeys(rows["unit"]))
    figure, axes = grid(plt, len(metrics), 2, sharey=True, sharex="row")
    figure.set_figheight(max(3.3, 0.32 * len(units) + 1.4) * len(metrics))
    titles = {"only": "only this part trained", "without": "all but this part trained"}
    for j, (side, title) in enumerate(titles.items()):
        axes[0][j].set_title(title)
        for i, metric in enumerate(metrics):
            axis = axes[i][j]
            for k, (group, color) in enumerate(colors.items()):
                selected = rows[(rows["group"] == group) & (rows["side"] == side)]
                summary = summarized(selected.assign(place=selected["unit"].map(units.index)), "place", metric)
                draw_points(
                    axis, summary.x + 0.16 * (k - (len(colors) - 1) / 2), summary, color, group, horizontal=True
                )
            draw_reference(axis, table, metric, colors, vertical=True)
            axis.set_xlabel(LABELS[metric])
            axis.set_yticks(range(len(units)), [unit.replace("_", " ") for unit in units])
    axes[0][0].invert_yaxis()
    return finished(figure, axes, table, "Modules and layers swapped")


def rank_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 3: leading and trailing components of the update."""
    rows = table[table["intervention"] == "rank"]
    colors, ends = group_colors(groups_of(rows)), [end for end in ("top", "bottom") if (rows["end"] == end).any()]
    figure, axes = grid(plt, len(metrics), len(ends), sharey="row", sharex=True)
    for j, end in enumerate(ends):
        for i, metric in enumerate(metrics):
            for group, color in colors.items():
                selected = rows[(rows["group"] == group) & (rows["end"] == end)]
                draw_line(axes[i][j], summarized(selected, "percent", metric), color, group)
            draw_reference(axes[i][j], table, metric, colors)
            axes[i][0].set_ylabel(LABELS[metric])
        axes[0][j].set_title({"top": "leading components", "bottom": "trailing components, own norm"}[end])
        axes[-1][j].set_xlabel("components kept (%)")
        axes[-1][j].set_xscale("log")
        ticks = sorted(rows["percent"].unique())
        axes[-1][j].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[-1][j].minorticks_off()
    norm = {"own": "their own norm", "full": "the whole update's norm", "shared": "a norm shared by all runs"}
    title = "Low-rank updates"
    if "top" in ends:
        title += f"; the leading components have {norm[rows[rows['end'] == 'top']['norm'].iloc[0]]}"
    return finished(figure, axes, table, title)


def norm_scaling_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 4c: early updates scaled toward the final norm, one panel per group."""
    rows = table[table["intervention"] == "norm_scaling"]
    colors = group_colors(groups_of(rows))
    steps = sorted(rows["step"].unique())
    shades = dict(zip(steps, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(steps))), strict=True))
    figure, axes = grid(plt, len(metrics), len(colors), sharey="row", sharex=True)
    for j, (group, color) in enumerate(colors.items()):
        axes[0][j].set_title(group)
        for i, metric in enumerate(metrics):
            for step in steps:
                selected = rows[(rows["group"] == group) & (rows["step"] == step)]
                if len(selected):
                    draw_line(axes[i][j], summarized(selected, "beta", metric), shades[step], f"step {step}")
            draw_reference(axes[i][j], table, metric, {group: color})
            axes[i][0].set_ylabel(LABELS[metric])
        axes[-1][j].set_xlabel("β (0: ΔW_t unchanged, 1: norm of the final update)")
    return finished(figure, axes, table, "Early updates scaled toward the final norm")


def random_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """The update against random directions of the same norm."""
    rows = table[table["intervention"] == "random"]
    groups = groups_of(rows)
    figure, axes = grid(plt, 1, len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (group, color) in enumerate(group_colors(groups).items()):
            selected = rows[rows["group"] == group].assign(place=float(i))
            trained = table[(table["intervention"] == "reference") & (table["group"] == group)].assign(place=float(i))
            draw_points(axis, [i - 0.12], summarized(trained, "place", metric), color, "")
            jitter = np.linspace(0.08, 0.2, len(selected)) if len(selected) > 1 else [0.12]
            axis.plot(i + np.asarray(jitter), selected[metric], "x", color=color)
        axis.plot([], [], "o", color=BASE_COLOR, label="trained")
        axis.plot([], [], "x", color=BASE_COLOR, label="a random direction")
        base = table[(table["intervention"] == "reference") & (table["group"] == "base")]
        axis.axhline(base[metric].mean(), color=BASE_COLOR, linestyle=":", linewidth=1.2, label="base")
        axis.set_xticks(range(len(groups)), groups)
        axis.margins(x=0.4)
        axis.set_ylabel(LABELS[metric])
    return finished(figure, axes, table, "Random directions of equal norm")


#: Intervention → drawing function.
FIGURES: dict[str, Callable[..., Any]] = {
    "alpha": alpha_figure,
    "trajectory": trajectory_figure,
    "embedding": embedding_figure,
    "window": window_figure,
    "swap": swap_figure,
    "rank": rank_figure,
    "norm_scaling": norm_scaling_figure,
    "random": random_figure,
    "linearity": linearity_figure,
}
