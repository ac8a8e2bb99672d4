"""Figures of `effopd analyze`, drawn from its tables alone: size and location of the updates.

    norms.png        update norm over training by module; shares   (paper: figure 1b)
    layers.png       update norm by layer, MLP and attention       (paper: figure 2b, right)
    spectrum.png     four spectral metrics over matrices           (paper: table 1)
    embeddings.png   rotation of token embeddings                  (paper: embedding analysis)
    sparsity.png     changed entries                               (arXiv 2606.07082)
    rotation.png     rotation of W0's own leading subspaces        (arXiv 2606.07082, 2606.13657)

`draw` adds the figures of `direction_figures`. Figures without data are skipped: a single pair, for
example, has no trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from effopd.analysis import table_queries
from effopd.report import direction_figures
from effopd.report.dynamics_data import (
    MODULE_COLORS,
    MODULE_NAMES,
    Data,
    bare,
    empty_figure,
    end_labels,
    figure_of,
    limit_y,
    lines_over_steps,
    strips,
)
from effopd.report.style import INK, MUTED, quiet_style, save


def draw(out_dir: str | Path) -> list[Path]:
    """Draw every figure that has data in the tables of `out_dir` into `out_dir/figures`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointError: `out_dir` holds no finished analysis.
    """
    data = Data(Path(out_dir))
    with quiet_style():
        drawn = [figure(data, data.out / "figures" / f"{name}.png") for name, figure in FIGURES.items()]
    return [path for path in drawn if path is not None]


def averaged_note(data: Data, text: str = "") -> str:
    """`text` and a sentence on what means and intervals are taken over."""
    parts = data.summary["parts"]["averaged"]
    several = [group for group, runs in data.groups.items() if len(runs) > 1]
    over = "over seeds if there are several, otherwise over matrices" if several else "over matrices"
    return f"{text}{' ' if text else ''}Means over {parts} attention and MLP matrices; 95 % intervals {over}."


def norms(data: Data, path: Path) -> Path | None:
    """Update norm over training, in total and by module; final shares of the squared norm."""
    moving, modules = data.moving, [m for m in MODULE_COLORS if m in data.summary["parts"]["modules"]]
    bars = 0.45 * (len(data.groups) + 1) + 0.9
    if moving:
        figure = empty_figure(12.5, 2.9 + bars)
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.9, bars])
        _norms_over_steps(top, data, [None, *(m for m in ("embedding", "attention", "mlp") if m in modules)])
    else:
        figure = empty_figure(8, 0.5 + bars)
        bottom = figure.subfigures(1, 1)
    _shares(bottom.subplots(), data, modules)
    seeds = "Shaded: 95 % over seeds. " if any(len(runs) > 1 for runs in moving.values()) else ""
    return save(
        figure, path, "Update norm over training and by module", f"{seeds}Shares are of the final squared norm."
    )


def _norms_over_steps(figure, data: Data, panels: Sequence[str | None]) -> None:
    """One panel per module (`None`: all parameters)."""
    rows = data.matrices[data.matrices["metric"] == "frobenius_norm"]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, module in zip(axes, panels, strict=True):
        of_module = rows if module is None else rows[rows["module"] == module]
        total = (
            of_module.assign(value=of_module["value"] ** 2)
            .groupby(["run", "step"], observed=True, dropna=False)["value"]
            .sum()
            ** 0.5
        )
        lines_over_steps(axis, data, total.reset_index())
        axis.set_ylim(bottom=0)
        axis.set_title("all parameters" if module is None else MODULE_NAMES.get(module, module))
    axes[0].set_ylabel(r"update norm $\|W_t - W_0\|$")


def _shares(axis, data: Data, modules: list[str]) -> None:
    """Stacked bars by module: share of the squared update norm, and share of parameters."""
    sizes = data.summary["parts"]["modules"]
    total = sum(sizes[m]["parameters"] for m in modules)
    bars = {"share of parameters": {m: sizes[m]["parameters"] / total for m in modules}}
    for group, values in reversed(data.summary["groups"].items()):
        name = f"{data.label(group)}, norm {values['update_norm']['mean']:.3g}"
        bars[name] = {m: values["modules"][m]["share"]["mean"] or 0.0 for m in modules}
    for y, shares in enumerate(bars.values()):
        left = 0.0
        for module in modules:
            share = shares[module]
            axis.barh(y, share, left=left, height=0.62, color=MODULE_COLORS[module], edgecolor="white", linewidth=0.8)
            if share > 0.045:
                color = "white" if module == "mlp" else INK
                axis.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
            left += share
    bare(axis)
    axis.set_yticks(range(len(bars)), list(bars))
    colors = [MUTED, *(data.colors[group] for group in reversed(data.groups))]
    for tick, color in zip(axis.get_yticklabels(), colors, strict=True):
        tick.set_color(color)
    axis.set_xlim(0, 1)
    axis.tick_params(length=0)
    axis.set_title("share of the squared update norm by module", loc="left")
    keys = [axis.barh([0], [0], color=MODULE_COLORS[m], label=MODULE_NAMES.get(m, m)) for m in modules]
    axis.legend(handles=keys, ncols=len(modules), loc="upper center", bbox_to_anchor=(0.5, 0.02))


def layers(data: Data, path: Path) -> Path | None:
    """Final update norm by layer for MLP and attention, and its share of the total squared norm."""
    count = len(next(iter(data.runs.values()))["layers"])
    if count < 2:
        return None
    figure, axes = figure_of(2, 2, width=4.4, height=2.7, sharex=True)
    for column, module in enumerate(("mlp", "attention")):
        for row, kind in enumerate(("norm", "share")):
            axis, labels, extent = axes[row][column], [], []
            for group, runs in data.groups.items():
                table = pd.DataFrame(
                    {r: [layer[f"{module}_{kind}"] for layer in data.runs[r]["layers"]] for r in runs}, dtype=float
                )
                color, mean = data.colors[group], table.mean(axis=1)
                if table.isna().all(axis=None):
                    continue
                if len(runs) > 1:
                    axis.plot(table.index, table, color=color, linewidth=0.7, alpha=0.45)
                marker = {"marker": "o", "markersize": 4} if count <= 16 else {}
                axis.plot(table.index, mean, color=color, linewidth=2, **marker)
                labels.append((float(count - 1), float(mean.iloc[-1]), data.label(group), color))
                extent += table.to_numpy().ravel().tolist()
            limit_y(axis, extent)
            axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            end_labels(axis, labels)
        axes[0][column].set_title(MODULE_NAMES.get(module, module))
        axes[1][column].set_xlabel("layer")
    axes[0][0].set_ylabel("norm of the final update")
    axes[1][0].set_ylabel("share of the total\nsquared norm")
    thin = "Bold: mean over seeds; thin: single seeds." if any(len(r) > 1 for r in data.groups.values()) else ""
    return save(figure, path, "Update norm by layer", thin)


def spectrum(data: Data, path: Path) -> Path | None:
    """Spectral norm, s1/‖ΔW‖, effective rank and top-1 % norm ratio of the final updates."""
    if not data.has("effective_rank"):
        return None
    figure, axes = figure_of(4, width=3.3, height=3.4)
    panels = {
        "spectral_norm": r"spectral norm $s_1$",
        "spectral_to_frobenius": r"$s_1 / \|\Delta W\|$",
        "effective_rank": "effective rank",
        "top1pct_norm_ratio": "norm in the top 1 % of directions",
    }
    for axis, (metric, title) in zip(axes[0], panels.items(), strict=True):
        floor = ("effective_rank_noise_floor", "rounding\nnoise") if metric == "effective_rank" else None
        strips(axis, data, data.last, metric, floor)
        axis.set_title(title)
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
    note = averaged_note(data, "Circles: attention, triangles: MLP; diamond: mean.")
    return save(figure, path, "Concentration of the final updates' spectra", note)


def embeddings(data: Data, path: Path) -> Path | None:
    """1 − mean row cosine over training; base and trained embeddings of tokens in a plane."""
    cosines = data.matrices[(data.matrices["metric"] == "row_cosine_mean") & (data.matrices["value"].notna())]
    if cosines.empty:
        return None
    matrix = "tokens" if (cosines["matrix"] == "tokens").any() else str(cosines["matrix"].iloc[0])
    cosines = cosines[cosines["matrix"] == matrix]
    points = data.table("embeddings")
    points = points[points["matrix"] == matrix]
    shown = {group: runs[0] for group, runs in data.groups.items() if (points["run"] == runs[0]).any()}
    compare = bool(data.moving) or len(data.groups) > 1
    figure, axes = figure_of(compare + len(shown), width=3.6, height=3.4)
    shift = cosines.assign(value=1.0 - cosines["value"])
    if compare:
        _shift(axes[0][0], data, shift)
    for axis, (group, run) in zip(axes[0][int(compare) :], shown.items(), strict=True):
        xy = points[points["run"] == run].pivot(index="point", columns="metric", values="value").astype(float)
        _moves(axis, xy, data.colors[group])
        turned = table_queries.at_step(shift, run, data.runs[run]["steps"][-1])["value"].iloc[0]
        axis.set_title(f"{run}: 1 − mean cosine = {turned:.2g}", color=data.colors[group])
    note = "Principal-component plane fitted on base and trained rows. Gray: base; color: trained, joined by a line."
    return save(figure, path, f"Rotation of the embeddings ({matrix})", note)


def _shift(axis, data: Data, shift: pd.DataFrame) -> None:
    """1 − mean row cosine over training, or at the end."""
    if data.moving:
        lines_over_steps(axis, data, shift)
    else:
        last = table_queries.final(shift, data.runs)
        for x, (group, runs) in enumerate(data.groups.items()):
            value = float(last.loc[last["run"].isin(runs), "value"].mean())
            axis.bar(x, value, color=data.colors[group], width=0.5)
            axis.annotate(f"{value:.2g}", (x, value), ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(data.groups)), list(data.groups))
    axis.set_ylim(bottom=0)
    axis.set_title("1 − mean cosine of a token's\nembedding before and after")


def _moves(axis, xy: pd.DataFrame, color: str) -> None:
    ends = np.stack([xy[["base_pc1", "base_pc2"]], xy[["trained_pc1", "trained_pc2"]]], axis=1)
    axis.plot(ends[:, :, 0].T, ends[:, :, 1].T, color=color, linewidth=0.5, alpha=0.35, zorder=1)
    size = float(np.clip(3000 / max(1, len(ends)), 2, 14))
    axis.scatter(*ends[:, 0].T, s=size, color=MUTED, alpha=0.5, linewidth=0, zorder=2)
    axis.scatter(*ends[:, 1].T, s=size, color=color, alpha=0.6, linewidth=0, zorder=3)
    bare(axis)


def _measures(data: Data, path: Path, panels: dict[str, tuple[str, str | None]], title: str, note: str) -> Path | None:
    """One panel per metric: over training, or over matrices if there is only a final value.

    Args:
        panels: metric → (title, metric of the chance line or `None`).
    """
    panels = {metric: spec for metric, spec in panels.items() if data.has(metric)}
    if not panels:
        return None
    figure, axes = figure_of(len(panels), width=3.6, height=3.2)
    for axis, (metric, (name, chance)) in zip(axes[0], panels.items(), strict=True):
        rows = data.averaged[(data.averaged["metric"] == metric) & ~data.at_rest]
        if data.moving and len(rows) > len(data.last[data.last["metric"] == metric]):
            lines_over_steps(axis, data, rows)
        else:
            strips(axis, data, data.last, metric)
        if chance is not None:
            level = 0.3 if chance == "alpha" else float(data.last[data.last["metric"] == chance]["value"].mean())
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, level - 0.05 * (high - low)), max(high, level + 0.08 * (high - low)))
            axis.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axis.annotate("chance", (0.01, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip
        if "degrees" in metric and axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
        axis.set_title(name)
    return save(figure, path, title, averaged_note(data, note))


def sparsity(data: Data, path: Path) -> Path | None:
    """Share of entries unchanged in bfloat16, update density, overlap with small weights."""
    panels: dict[str, tuple[str, str | None]] = {
        "bf16_unchanged_share": ("share of entries unchanged in bf16", None),
        "update_density": ("share changed by more than 0.1 %", None),
        "low_magnitude_overlap": ("changed entries among the\n30 % smallest of W0", "low_magnitude_overlap_chance"),
    }
    return _measures(data, path, panels, "Changed entries", "")


def rotation(data: Data, path: Path) -> Path | None:
    """Principal angles between leading subspaces of W0 and W_T; overlap with principal weights."""
    panels: dict[str, tuple[str, str | None]] = {
        "base_rotation_left_mean_degrees": (f"left top-{data.k}: mean angle (°)", None),
        "base_rotation_right_mean_degrees": (f"right top-{data.k}: mean angle (°)", None),
        "principal_overlap": ("changed entries among the\n30 % principal ones of W0", "alpha"),
        "base_spectral_shift": ("shift of the singular values\nof W0, relative", None),
    }
    return _measures(data, path, panels, "Rotation of W0's own leading directions", "")


FIGURES: dict[str, Callable[[Data, Path], Path | None]] = {
    "norms": norms,
    "layers": layers,
    "spectrum": spectrum,
    **direction_figures.FIGURES,
    "embeddings": embeddings,
    "sparsity": sparsity,
    "rotation": rotation,
}
