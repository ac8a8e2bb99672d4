"""Figures of intervention scans, drawn from the results table alone (see `effopd.interventions.results`).

One function a scan. Runs of one label are seeds: their mean is a line, from the lowest to the highest seed a band; with
one seed the band is the 95 % interval over prompts. Where a KL to a teacher was measured, a second row shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from effopd.common.optional import require
from effopd.report.style import group_colors

_BASE = "#4c566a"
_LABELS = {
    "accuracy": "accuracy",
    "kl": "reverse KL to the teacher\n(nats per token)",
    "update_norm": "‖ΔW‖ of the model evaluated",
}


def draw(table: pd.DataFrame, scan: str, path: Path) -> Path:
    """Draw the figure of `scan` to `path` (PNG).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    metrics = ["accuracy", *(["kl"] if "kl" in table and table["kl"].notna().any() else [])]
    figure = FIGURES[scan](plt, table, metrics)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


# -- pieces ---------------------------------------------------------------------------------------------------------


def _grid(plt, rows: int, columns: int, width: float = 4.6, **share: Any):
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


def _groups(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["group"]))


def _reference(axis, table: pd.DataFrame, metric: str, colors: dict[str, str], vertical: bool = False) -> None:
    """Lines across: the base, and each group's trained model (mean over its seeds)."""
    draw_line = axis.axvline if vertical else axis.axhline
    rows = table[table["scan"] == "reference"]
    for group, of_group in rows.groupby("group", sort=False):
        color = _BASE if group == "base" else colors.get(group)
        if color is not None:
            label = "base" if group == "base" else f"{group}, trained"
            draw_line(of_group[metric].mean(), color=color, linestyle=":", linewidth=1.2, label=label, zorder=1)


def _summary(rows: pd.DataFrame, key: str, metric: str, x: str | None = None) -> pd.DataFrame:
    """Columns x, mean, low, high: one row a value of `key`; the band is over seeds, or over prompts for a single one."""
    out = []
    for value, of_value in rows.groupby(key, sort=True):
        values = of_value[metric].astype(float)
        low, high = values.min(), values.max()
        if len(of_value) == 1:
            low, high = (float(of_value[f"{metric}_{end}"].iloc[0]) for end in ("low", "high"))
        where = float(of_value[x].mean()) if x else float(value)
        out.append({"x": where, "mean": values.mean(), "low": low, "high": high})
    return pd.DataFrame(out, columns=["x", "mean", "low", "high"])


def _line(axis, summary: pd.DataFrame, color: str, label: str, **style: Any) -> None:
    axis.plot(summary.x, summary["mean"], color=color, label=label, **({"marker": "o", "markersize": 4} | style))
    axis.fill_between(summary.x, summary.low, summary.high, color=color, alpha=0.13, linewidth=0)


def _points(axis, positions, summary: pd.DataFrame, color: str, label: str, horizontal: bool = False) -> None:
    error = np.clip([summary["mean"] - summary.low, summary.high - summary["mean"]], 0, None)
    style = {"fmt": "o", "color": color, "label": label, "capsize": 3, "markersize": 5}
    if horizontal:
        axis.errorbar(summary["mean"], positions, xerr=error, **style)
    else:
        axis.errorbar(positions, summary["mean"], yerr=error, **style)


def _finish(figure, axes, table: pd.DataFrame, title: str) -> Any:
    """One legend for all panels, below them; a title that says what bands and bars are."""
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
    bands = f"mean of seeds, from the lowest to the highest; one seed: {bands}" if seeds else bands
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 0.995, f"\n\n{int(table['n'].max())} prompts; {bands}", ha="center", va="top", fontsize=8.5)
    return figure


# -- one a scan -----------------------------------------------------------------------------------------------------


def _curves(plt, table: pd.DataFrame, metrics: list[str], scan: str, key: str, xs: dict[str | None, str], title: str):
    """Metrics (rows) against several abscissas (columns), a line a group."""
    rows = table[table["scan"] == scan]
    colors = group_colors(_groups(rows))
    figure, axes = _grid(plt, len(metrics), len(xs), sharey="row", sharex="col")
    for i, metric in enumerate(metrics):
        for j, (x, label) in enumerate(xs.items()):
            axis = axes[i][j]
            for group, color in colors.items():
                _line(axis, _summary(rows[rows["group"] == group], key, metric, x).sort_values("x"), color, group)
            _reference(axis, table, metric, colors)
            axes[-1][j].set_xlabel(label)
        axes[i][0].set_ylabel(_LABELS[metric])
    return _finish(figure, axes, table, title)


def alpha_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 1a: along the straight line from the base to the trained model."""
    xs = {"update_norm": "‖αΔW‖", None: "α"}
    return _curves(plt, table, metrics, "alpha", "alpha", xs, "Along the update: W0 + αΔW")


def trajectory_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 1b: along training."""
    xs = {"update_norm": "‖ΔW_t‖", None: "optimizer step t"}
    return _curves(plt, table, metrics, "trajectory", "step", xs, "Along training: W_t")


def embedding_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 2a: trained models with the base's embeddings."""
    rows = table[table["scan"] == "embedding"]
    colors = group_colors(_groups(rows))
    kinds = ["base", "trained", *dict.fromkeys(rows["replaced"])]
    figure, axes = _grid(plt, 1, len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (group, color) in enumerate(colors.items()):
            reference = table[(table["scan"] == "reference") & (table["group"] == group)]
            both = pd.concat([reference.assign(replaced="trained"), rows[rows["group"] == group]])
            summary = _summary(both.assign(kind=both["replaced"].map(kinds.index)), "kind", metric)
            _points(axis, summary.x + 0.12 * (i - (len(colors) - 1) / 2), summary, color, group)
        base = table[(table["scan"] == "reference") & (table["group"] == "base")].assign(kind=0)
        _points(axis, [0], _summary(base, "kind", metric), _BASE, "base")
        names = [kind if kind in kinds[:2] else f"trained, with\nthe base's {kind}" for kind in kinds]
        axis.set_xticks(range(len(kinds)), names)
        axis.margins(x=0.15)
        axis.set_ylabel(_LABELS[metric])
    return _finish(figure, axes, table, "Embedding replacement")


def window_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 2b: windows of trained layers on the base, with the layer-wise norms below."""
    rows = table[table["scan"] == "window"]
    colors, modules = group_colors(_groups(rows)), [m for m in ("mlp", "attention") if (rows["module"] == m).any()]
    figure, axes = _grid(plt, len(metrics) + 1, len(modules), sharex=True, sharey="row")
    for j, module in enumerate(modules):
        for k, (group, color) in enumerate(colors.items()):
            of_group = rows[(rows["group"] == group) & (rows["module"] == module)]
            for i, metric in enumerate(metrics):
                _line(axes[i][j], _summary(of_group, "centre", metric), color, group)
            norms = of_group.groupby("centre")["layer_norm"].mean()
            width = 0.8 / len(colors)
            shift = width * (k - (len(colors) - 1) / 2)
            axes[-1][j].bar(norms.index.to_numpy(float) + shift, norms.to_numpy(float), width, color=color, alpha=0.7)
        for i, metric in enumerate(metrics):
            _reference(axes[i][j], table, metric, colors)
            axes[i][0].set_ylabel(_LABELS[metric])
        half = int(rows["half_width"].iloc[0])
        where = f" of layers l−{half} … l+{half}" if half else " of layer l"
        axes[0][j].set_title({"mlp": "MLP", "attention": "attention"}[module] + where)
        axes[-1][j].set_xlabel("centre layer l")
        axes[-1][j].xaxis.get_major_locator().set_params(integer=True)
    axes[-1][0].set_ylabel("‖ΔW‖ of layer l")
    return _finish(figure, axes, table, "Trained layers on the base, a window at a time")


def swap_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Each module and layer, alone or left out."""
    rows = table[table["scan"] == "swap"]
    colors, units = group_colors(_groups(rows)), list(dict.fromkeys(rows["unit"]))
    figure, axes = _grid(plt, len(metrics), 2, sharey=True, sharex="row")
    figure.set_figheight(max(3.3, 0.32 * len(units) + 1.4) * len(metrics))
    titles = {"only": "the base, with this trained", "without": "the trained model, with this of the base"}
    for j, (side, title) in enumerate(titles.items()):
        axes[0][j].set_title(title)
        for i, metric in enumerate(metrics):
            axis = axes[i][j]
            for k, (group, color) in enumerate(colors.items()):
                of_group = rows[(rows["group"] == group) & (rows["side"] == side)]
                summary = _summary(of_group.assign(place=of_group["unit"].map(units.index)), "place", metric)
                _points(axis, summary.x + 0.16 * (k - (len(colors) - 1) / 2), summary, color, group, horizontal=True)
            _reference(axis, table, metric, colors, vertical=True)
            axis.set_xlabel(_LABELS[metric])
            axis.set_yticks(range(len(units)), [unit.replace("_", " ") for unit in units])
    axes[0][0].invert_yaxis()
    return _finish(figure, axes, table, "Modules and layers swapped")


def rank_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 3: the leading and the trailing components of the update."""
    rows = table[table["scan"] == "rank"]
    colors, ends = group_colors(_groups(rows)), [end for end in ("top", "bottom") if (rows["end"] == end).any()]
    figure, axes = _grid(plt, len(metrics), len(ends), sharey="row", sharex=True)
    for j, end in enumerate(ends):
        for i, metric in enumerate(metrics):
            for group, color in colors.items():
                of_group = rows[(rows["group"] == group) & (rows["end"] == end)]
                _line(axes[i][j], _summary(of_group, "percent", metric), color, group)
            _reference(axes[i][j], table, metric, colors)
            axes[i][0].set_ylabel(_LABELS[metric])
        axes[0][j].set_title({"top": "leading components", "bottom": "trailing components, norm untouched"}[end])
        axes[-1][j].set_xlabel("components kept (%)")
        axes[-1][j].set_xscale("log")
        ticks = sorted(rows["percent"].unique())
        axes[-1][j].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[-1][j].minorticks_off()
    norm = {"own": "their own norm", "full": "the whole update's norm", "shared": "a norm shared by all runs"}
    title = "Low-rank updates"
    if "top" in ends:
        title += f"; the leading components have {norm[rows[rows['end'] == 'top']['norm'].iloc[0]]}"
    return _finish(figure, axes, table, title)


def norm_scaling_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """Paper, fig. 4c: early updates stretched towards the final norm, a panel a run."""
    rows = table[table["scan"] == "norm_scaling"]
    colors = group_colors(_groups(rows))
    steps = sorted(rows["step"].unique())
    shades = dict(zip(steps, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(steps))), strict=True))
    figure, axes = _grid(plt, len(metrics), len(colors), sharey="row", sharex=True)
    for j, (group, color) in enumerate(colors.items()):
        axes[0][j].set_title(group)
        for i, metric in enumerate(metrics):
            for step in steps:
                of_group = rows[(rows["group"] == group) & (rows["step"] == step)]
                if len(of_group):
                    _line(axes[i][j], _summary(of_group, "beta", metric), shades[step], f"step {step}")
            _reference(axes[i][j], table, metric, {group: color})
            axes[i][0].set_ylabel(_LABELS[metric])
        axes[-1][j].set_xlabel("β (0: ΔW_t as it is, 1: norm of the final update)")
    return _finish(figure, axes, table, "Early updates at larger norms")


def random_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """The update against random directions of its norm."""
    rows = table[table["scan"] == "random"]
    groups = _groups(rows)
    figure, axes = _grid(plt, 1, len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (group, color) in enumerate(group_colors(groups).items()):
            of_group = rows[rows["group"] == group].assign(place=float(i))
            trained = table[(table["scan"] == "reference") & (table["group"] == group)].assign(place=float(i))
            _points(axis, [i - 0.12], _summary(trained, "place", metric), color, "")
            jitter = np.linspace(0.08, 0.2, len(of_group)) if len(of_group) > 1 else [0.12]
            axis.plot(i + np.asarray(jitter), of_group[metric], "x", color=color)
        axis.plot([], [], "o", color=_BASE, label="trained")
        axis.plot([], [], "x", color=_BASE, label="a random direction")
        base = table[(table["scan"] == "reference") & (table["group"] == "base")]
        axis.axhline(base[metric].mean(), color=_BASE, linestyle=":", linewidth=1.2, label="base")
        axis.set_xticks(range(len(groups)), groups)
        axis.margins(x=0.4)
        axis.set_ylabel(_LABELS[metric])
    return _finish(figure, axes, table, "Random directions of equal norm")


#: Name of a scan → its figure.
FIGURES: dict[str, Callable[..., Any]] = {
    "alpha": alpha_figure,
    "trajectory": trajectory_figure,
    "embedding": embedding_figure,
    "window": window_figure,
    "swap": swap_figure,
    "rank": rank_figure,
    "norm_scaling": norm_scaling_figure,
    "random": random_figure,
}
