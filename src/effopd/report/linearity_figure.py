"""Figure of `effopd intervene linearity`: true and predicted KL along Δ, and over training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from effopd.report.intervention_panels import draw_line, finished, grid, groups_of, summarized
from effopd.report.style import group_colors

#: Scale of the error over training; the nearest measured scale is drawn.
_SCALE = 8.0
#: Steps whose curves are drawn: first, middle and last.
_CURVES = 3
_TITLES = {"previous": "Δ from the previous saved step", "base": "Δ from the base"}


def linearity_figure(plt, table: pd.DataFrame, metrics: list[str]):
    """One row of panels per anchor: curves of every group, then error and best scale by step.

    The last two are left out if no step is known.
    """
    rows = table[table["intervention"] == "linearity"]
    groups = groups_of(rows)
    anchors = list(dict.fromkeys(rows["anchor"]))
    colors = group_colors(groups)
    figure, axes = grid(plt, len(anchors), len(groups) + 2, width=3.9)
    for i, anchor in enumerate(anchors):
        here = rows[rows["anchor"] == anchor]
        for j, group in enumerate(groups):
            _draw_curves(plt, axes[i][j], here[here["group"] == group])
            axes[i][j].set_title(f"{group}: {_TITLES[anchor]}", fontsize=10)
            axes[i][j].set_yscale("log")
            axes[i][j].set_ylim(*_limits(here))
            _plain_ticks(axes[i][j], *_limits(here))
        axes[i][0].set_ylabel("reverse KL to the teacher\non rollouts of W_t (nats per token)")
        error, best = axes[i][-2:]
        if here["step"].isna().all():  # checkpoints without a step
            for axis in (error, best):
                axis.set_visible(False)
            continue
        scale = min(here[here["known"] == 0]["scale"], key=lambda s: abs(s - _SCALE), default=None)
        for group, color in colors.items():
            of_group = here[here["group"] == group].dropna(subset=["step"])
            if scale is not None:
                summary = summarized(of_group[of_group["scale"] == scale], "step", "kl_ratio")
                draw_line(error, summary, color, group)
            _draw_best(best, of_group, color, group)
        error.axhline(1, color="0.3", linewidth=0.8)
        error.set_yscale("log")
        _plain_ticks(error, *error.get_ylim())
        error.set_title("" if scale is None else f"predicted / true KL at s = {scale:g}", fontsize=10)
        best.set_yscale("symlog", linthresh=0.5)
        _plain_ticks(best, *best.get_ylim())
        best.set_title("best scale: true (line), predicted (×)", fontsize=10)
        for axis in (error, best):
            axis.set_xlabel("optimizer step t")
    return finished(figure, axes, table, "KL along W_t + sΔ: predicted from two forward passes, and true")


def _draw_curves(plt, axis, rows: pd.DataFrame) -> None:
    """True (line) and predicted (dashes) KL against s, means over seeds, for a few steps."""
    steps = sorted(rows["step"].dropna().unique())
    chosen = [steps[k] for k in sorted({round(k) for k in np.linspace(0, len(steps) - 1, _CURVES)})] if steps else []
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(1, len(chosen))))
    parts = [(f"step {step}", rows[rows["step"] == step]) for step in chosen] or [("trained", rows)]
    for (label, part), color in zip(parts, shades, strict=True):
        true, predicted = summarized(part, "scale", "kl"), summarized(part, "scale", "kl_predicted")
        draw_line(axis, true, color, label, markersize=3)
        axis.plot(predicted.x, predicted["mean"], color=color, linestyle="--", linewidth=1.2)
        known = true[true.x.isin(part[part["known"] == 1]["scale"])]
        axis.plot(known.x, known["mean"], "o", color=color, markersize=7, markerfacecolor="none")
    axis.plot([], [], color="0.3", linestyle="--", linewidth=1.2, label="predicted")
    axis.plot([], [], "o", color="0.3", markersize=7, markerfacecolor="none", label="hidden states known")
    axis.set_xscale("symlog", base=2, linthresh=0.5)
    scales = sorted(scale for scale in rows["scale"].unique() if scale == 0 or abs(scale) >= 0.5)
    axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axis.minorticks_off()
    axis.set_xlabel("scale s")


def _draw_best(axis, rows: pd.DataFrame, color: str, label: str) -> None:
    """True and predicted best scale against the step: mean over seeds with their range."""
    lines = rows.drop_duplicates(["run", "step"])
    for name in ("best_true", "best_predicted"):
        lines = lines.assign(**{f"{name}_low": lines[name], f"{name}_high": lines[name]})
    draw_line(axis, summarized(lines, "step", "best_true"), color, label)
    predicted = summarized(lines, "step", "best_predicted")
    axis.plot(predicted.x, predicted["mean"], "x", color=color, markersize=7)


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits of the KL axis from the true KLs, which all groups share."""
    values = rows["kl"].astype(float)
    values = values[np.isfinite(values) & (values > 0)]
    return (float(values.min()) / 1.5, float(values.max()) * 1.5) if len(values) else (1e-3, 1.0)


def _plain_ticks(axis, low: float, high: float) -> None:
    """Ticks 1, 2, 5, 10, … between two positive or negative limits; only powers of ten if many."""
    decades = [10.0**k for k in range(-6, 7)]
    many = low > 0 and high / low > 100
    steps = [m * d for d in decades for m in ((1.0,) if many else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))]
    if low > 0 and high / low < 1.6:
        steps = [k / 20 for k in range(10, 41)]
    ticks = [t for t in sorted({0.0, *steps, *(-s for s in steps)}) if low <= t <= high]
    inner = [t for t in ticks if t == 0 or abs(t) >= 0.5] if low <= 0 else ticks
    axis.set_yticks(inner, [f"{t:g}" for t in inner])
    axis.minorticks_off()
