"""Charts of the page of `effopd analyze`: norms, layers, spectra, embeddings, changed entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from effopd.analysis import table_queries
from effopd.common.statistics import Interval, bootstrap_mean
from effopd.report.charts import NEUTRAL, Axis, Chart, Panel, Rule, Series
from effopd.report.dynamics_data import MODULE_NAMES, Data
from effopd.report.style import Look

_STEP = Axis("step")
#: Most tokens drawn in the plane of the embeddings.
_TOKENS = 400


def over_steps(data: Data, rows: pd.DataFrame) -> list[Series]:
    """Every group's mean over training with its interval, and thin lines for single seeds.

    A group without a trajectory is a dashed line at its final value.

    Args:
        rows: one value per run, step and matrix (columns run, step, value).
    """
    ends = [steps for runs in data.moving.values() for steps in map(data.steps, runs)]
    left, right = min(steps[0] for steps in ends), max(steps[-1] for steps in ends)
    found = []
    for group, runs in data.groups.items():
        look, moving, label = data.looks[group], data.moving.get(group), data.label(group)
        of_group = rows[rows["run"].isin(moving or runs)]
        if not moving:
            final = table_queries.final(of_group, {run: data.runs[run] for run in runs})
            y = float(final["value"].mean())
            dashed = Look(look.light, look.dark, "6 4", look.marker)
            found.append(Series(label, [left, right], [y, y], dashed, points=False, note="final value"))
            continue
        band = data.band(group, of_group)
        steps = [int(step) for step in band.index]
        found.append(Series(label, steps, list(band["mean"]), look, list(band["low"]), list(band["high"])))
        for run in moving if len(moving) > 1 else ():
            line = of_group[of_group["run"] == run].groupby("step")["value"].mean()
            x = [int(step) for step in line.index]
            found.append(Series(label, x, line.to_list(), look, width=0.7, points=False, note=run))
    return found


def strips(
    data: Data, rows: pd.DataFrame, metric: str, extra: tuple[str, str] | None = None
) -> tuple[Axis, list[Series]]:
    """Distribution of a metric over matrices, one column per group, with mean and interval.

    Args:
        rows: final rows of the `matrices` table.
        extra: (metric, name) of a reference in a gray column, such as the noise floor.
    """
    columns: list[tuple[str, pd.Series, Look, Interval]] = []
    wide = table_queries.by_matrix(rows[rows["metric"] == metric])
    for group, runs in data.groups.items():
        values = wide.reindex(columns=runs).mean(axis=1)
        columns.append((data.label(group), values, data.looks[group], data.interval(group, metric)))
    if extra is not None:
        values = table_queries.by_matrix(rows[rows["metric"] == extra[0]]).mean(axis=1)
        columns.append((extra[1], values, NEUTRAL, bootstrap_mean(values, 500)))
    found = []
    for x, (label, values, look, mean) in enumerate(columns):
        values = values.dropna()
        places = x - 0.1 + np.random.default_rng(0).uniform(-0.13, 0.13, len(values))
        tips = [_place(*place) for place in values.index]
        found.append(Series(label, places.tolist(), values.to_list(), look, line=False, tips=tips))
        diamond = Look(look.light, look.dark, "", "D")
        found.append(
            Series(
                label, [x + 0.25], [mean.mean], diamond, [mean.low], [mean.high], bars=True, tips=["mean"], line=False
            )
        )
    ticks = [(float(x), label) for x, (label, *_) in enumerate(columns)]
    return Axis("", ticks=ticks, limits=(-0.5, len(columns) - 0.35)), found


def _place(layer: int, module: str, matrix: str) -> str:
    return f"layer {layer}, {matrix}" if layer >= 0 else f"{module}, {matrix}"


def norms(data: Data) -> Chart | None:
    """Update norm over training, in total and by module."""
    if not data.moving:
        return None
    rows = data.matrices[data.matrices["metric"] == "frobenius_norm"]
    panels = []
    for module in (None, "embedding", "attention", "mlp"):
        of_module = rows if module is None else rows[rows["module"] == module]
        squares = of_module.assign(value=of_module["value"] ** 2)
        total = squares.groupby(["run", "step"], observed=True, dropna=False)["value"].sum() ** 0.5
        title = "all parameters" if module is None else MODULE_NAMES.get(module, module)
        if len(total):
            panels.append(
                Panel(title, _STEP, Axis("update norm ‖W_t − W_0‖", zero=True), over_steps(data, total.reset_index()))
            )
    note = "Update norm over training, in total and by module."
    return Chart("norms", note, panels, f"{note}{_seeds(data)}")


def _seeds(data: Data) -> str:
    several = any(len(runs) > 1 for runs in data.groups.values())
    return " Bold: mean over seeds, shaded: 95 % interval over seeds, thin: single seeds." if several else ""


def layers(data: Data) -> Chart | None:
    """Final update norm by layer for MLP and attention, and its share of the total squared norm."""
    if len(next(iter(data.runs.values()))["layers"]) < 2:
        return None
    panels = []
    for kind, name in (("norm", "norm of the final update"), ("share", "share of the total squared norm")):
        for module in ("mlp", "attention"):
            lines = []
            for group, runs in data.groups.items():
                values = {run: [layer[f"{module}_{kind}"] for layer in data.runs[run]["layers"]] for run in runs}
                table = pd.DataFrame(values, dtype=float)
                label, x = data.label(group), list(range(len(table)))
                lines.append(Series(label, x, table.mean(axis=1).to_list(), data.looks[group]))
                for run in runs if len(runs) > 1 else ():
                    lines.append(
                        Series(label, x, table[run].to_list(), data.looks[group], width=0.7, points=False, note=run)
                    )
            panels.append(Panel(MODULE_NAMES.get(module, module), Axis("layer"), Axis(name, zero=True), lines))
    note = "Final update norm by layer, and its share of the total squared norm."
    thin = " Bold: mean over seeds; thin: single seeds." if any(len(r) > 1 for r in data.groups.values()) else ""
    return Chart("layers", note, panels, note + thin)


def spectrum(data: Data) -> Chart | None:
    """Spectral norm, s1/‖ΔW‖, effective rank and top-1 % norm ratio of the final updates."""
    if not data.has("effective_rank"):
        return None
    names = {
        "spectral_norm": "spectral norm s1",
        "spectral_to_frobenius": "s1 / ‖ΔW‖",
        "effective_rank": "effective rank",
        "top1pct_norm_ratio": "norm in the top 1 % of directions",
    }
    panels = []
    for metric, title in names.items():
        floor = ("effective_rank_noise_floor", "rounding noise") if metric == "effective_rank" else None
        x, series = strips(data, data.last, metric, floor)
        panels.append(Panel(title, x, Axis("", _scale(series)), series))
    note = "Spectra of the final updates. Points: attention and MLP matrices; diamonds: mean with 95 % interval."
    return Chart("spectrum", note, panels, note)


def _scale(series: Iterable[Series]) -> str:
    """Logarithmic if all values are positive and span a factor of 30."""
    values = [y for one in series for y in one.y if y is not None and np.isfinite(y)]
    return "log" if values and min(values) > 0 and max(values) > 30 * min(values) else "linear"


def embeddings(data: Data) -> Chart | None:
    """1 − mean row cosine over training; base and trained embeddings of tokens in a plane."""
    cosines = data.matrices[(data.matrices["metric"] == "row_cosine_mean") & (data.matrices["value"].notna())]
    if cosines.empty:
        return None
    matrix = "tokens" if (cosines["matrix"] == "tokens").any() else str(cosines["matrix"].iloc[0])
    cosines = cosines[cosines["matrix"] == matrix]
    shift = cosines.assign(value=1.0 - cosines["value"])
    y = Axis("1 − mean cosine", zero=True)
    panels = []
    if data.moving:
        panels.append(Panel("Tokens before and after training", _STEP, y, over_steps(data, shift)))
    points = data.table("embeddings")
    points = points[points["matrix"] == matrix]
    for group, runs in data.groups.items():
        of_run = points[points["run"] == runs[0]]
        if len(of_run):
            xy = of_run.pivot(index="point", columns="metric", values="value").astype(float)
            turned = table_queries.at_step(shift, runs[0], data.runs[runs[0]]["steps"][-1])["value"].iloc[0]
            title = f"{runs[0]}: 1 − mean cosine = {turned:.2g}"
            panels.append(Panel(title, Axis("component 1"), Axis("component 2"), _moves(xy, data, group)))
    note = "Principal-component plane fitted on base and trained rows. Crosses: base; color: trained."
    return Chart("embeddings", f"Rotation of the embeddings ({matrix})", panels, note)


def _moves(xy: pd.DataFrame, data: Data, group: str) -> list[Series]:
    xy = xy.iloc[:: max(1, len(xy) // _TOKENS)]
    tips = [f"token {point}" for point in xy.index]
    before, after = ([xy[f"{when}_pc{axis}"].to_list() for axis in (1, 2)] for when in ("base", "trained"))
    return [
        Series("base", before[0], before[1], Look(NEUTRAL.light, NEUTRAL.dark, "", "X"), line=False, tips=tips),
        Series(data.label(group), after[0], after[1], data.looks[group], line=False, tips=tips),
    ]


def _measures(data: Data, name: str, panels: Mapping[str, tuple[str, str | None]], title: str) -> Chart | None:
    """One panel per metric: over training, or over matrices if there is only a final value.

    Args:
        panels: metric → (title, metric of the chance line or `None`).
    """
    drawn = []
    for metric, (heading, chance) in panels.items():
        if not data.has(metric):
            continue
        rows = data.averaged[(data.averaged["metric"] == metric) & ~data.at_rest]
        rules: Sequence[Rule] = ()
        if chance is not None:
            level = 0.3 if chance == "alpha" else float(data.last[data.last["metric"] == chance]["value"].mean())
            rules = [Rule(level, "chance")]
        if data.moving and len(rows) > len(data.last[data.last["metric"] == metric]):
            x, series = _STEP, over_steps(data, rows)
        else:
            x, series = strips(data, data.last, metric)
        drawn.append(Panel(heading, x, Axis(""), series, rules))
    parts = data.summary["parts"]["averaged"]
    note = f"{title}. Means over {parts} attention and MLP matrices with 95 % intervals."
    return Chart(name, note, drawn, note + _seeds(data), columns=3) if drawn else None


def entries(data: Data) -> Chart | None:
    """Share of entries unchanged in bfloat16, update density, overlap with small weights."""
    panels: dict[str, tuple[str, str | None]] = {
        "bf16_unchanged_share": ("share of entries unchanged in bf16", None),
        "update_density": ("share changed by more than 0.1 %", None),
        "low_magnitude_overlap": ("changed entries among the 30 % smallest of W0", "low_magnitude_overlap_chance"),
    }
    return _measures(data, "entries", panels, "Changed entries")


def rotation(data: Data) -> Chart | None:
    """Principal angles between leading subspaces of W0 and W_T; overlap with principal weights."""
    panels: dict[str, tuple[str, str | None]] = {
        "base_rotation_left_mean_degrees": (f"left top-{data.k}: mean angle, degrees", None),
        "base_rotation_right_mean_degrees": (f"right top-{data.k}: mean angle, degrees", None),
        "principal_overlap": ("changed entries among the 30 % principal ones of W0", "alpha"),
        "base_spectral_shift": ("shift of the singular values of W0, relative", None),
    }
    return _measures(data, "rotation", panels, "Rotation of W0's own leading directions")
