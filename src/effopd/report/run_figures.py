"""A run in pictures: quality against steps and net seconds, every search along its ray, what training logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from effopd.common.optional import require
from effopd.extrapolate.search import Score, paired_gain
from effopd.report.style import INK, MARKERS, MUTED, group_colors

Rows = Sequence[Mapping[str, Any]]
#: logged value → how its panel is called
LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "learning_rate": "learning rate",
    "health/reverse_kl": "reverse KL on fresh rollouts",
    "health/overlap_ratio": "top-k overlap with the teacher",
    "entropy": "student's entropy, nats",
    "completions/mean_length": "tokens per answer",
    "completions/clipped_ratio": "answers cut at the limit",
    "grad_norm": "gradient norm",
}
_QUALITY = {
    "eval_kl": "held-out reverse KL to the teacher\n(nats per token, 95 % interval)",
    "eval_accuracy": "held-out accuracy\n(95 % interval)",
}


def pyplot():
    """matplotlib's pyplot, drawing to files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


def quality_figure(
    runs: Mapping[str, Rows],
    searches: Mapping[str, Rows],
    target: float | None = None,
    teacher_accuracy: float | None = None,
    colors: Mapping[str, str] | None = None,
    seconds: str = "net seconds",
):
    """Held-out KL and accuracy (rows; those that were measured) against optimizer steps and net seconds (columns).

    Args:
        runs: rows of `evals.jsonl` by label.
        searches: rows of `searches.jsonl` by label; accepted jumps forwards are marked on the curves.
        target: a KL to draw as a line.
        teacher_accuracy: an accuracy to draw as a line.
        colors: by label; others get one of the palette.
        seconds: what the runs' clock counts.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [key for key in _QUALITY if any(key in row for rows in runs.values() for row in rows)]
    colors = group_colors(runs) | dict(colors or {})
    figure, axes = pyplot().subplots(
        len(shown),
        2,
        figsize=(11, 1 + 3 * len(shown)),
        sharey="row",
        sharex="col",
        constrained_layout=True,
        squeeze=False,
    )
    axis_of: Sequence[tuple[str, Callable[[Mapping[str, Any]], float]]] = (
        ("optimizer steps", lambda row: row["step"]),
        (f"{seconds} (search charged, evaluation not)", lambda row: row["cost/net_seconds"]),
    )
    for panels, key in zip(axes, shown, strict=True):
        for axis, (_, x_of) in zip(panels, axis_of, strict=True):
            for i, (label, all_rows) in enumerate(runs.items()):
                rows = [row for row in all_rows if key in row]
                jumps = [row["step"] for row in searches.get(label, ()) if row["accepted_scale"] > 0]
                look = {"color": colors[label], "marker": MARKERS[i % len(MARKERS)], "label": label}
                _curve(axis, rows, key, x_of, jumps, look)
        panels[0].set_ylabel(_QUALITY[key])
        line, name = (target, "target") if key == "eval_kl" else (teacher_accuracy, "teacher")
        for axis in panels:
            if key == "eval_kl":
                axis.set_yscale("log")
            if line is not None:
                axis.axhline(line, color=MUTED, linestyle=":", linewidth=1.2, label=name)
        if any(row["accepted_scale"] > 0 for rows in searches.values() for row in rows):
            panels[0].plot([], [], marker="^", color=INK, linestyle="", label="jump")
        panels[0].legend()
    for axis, (name, _) in zip(axes[-1], axis_of, strict=True):
        axis.set_xlabel(name)
    return figure


def _curve(
    axis,
    rows: Rows,
    key: str,
    x_of: Callable[[Mapping[str, Any]], float],
    jumps: Iterable[int],
    look: Mapping[str, Any],
) -> None:
    """A point an evaluation, joined by a thin line, with its interval; a triangle at the first one after each jump."""
    x, y = [x_of(row) for row in rows], [row[key] for row in rows]
    axis.plot(x, y, linewidth=1.1, markersize=3.5 if len(rows) <= 60 else 2, **look)
    if interval := _interval(rows, key):
        axis.fill_between(x, *interval, color=look["color"], alpha=0.12, linewidth=0)
    first_after = {next((i for i, row in enumerate(rows) if row["step"] >= step), None) for step in jumps} - {None}
    marked = sorted(i for i in first_after if i is not None)
    axis.plot(
        [x[i] for i in marked], [y[i] for i in marked], "^", color=look["color"], markersize=8,
        markeredgecolor=INK, markeredgewidth=0.8, zorder=5,
    )  # fmt: skip


def _interval(rows: Rows, key: str) -> tuple[list[float], list[float]] | None:
    """Lower and upper ends: an accuracy's 95 % interval, a KL ± 1.96 standard errors (above 0: its axis is logarithmic)."""
    if rows and all(row.get(f"{key}_low") is not None for row in rows):
        return [row[f"{key}_low"] for row in rows], [row[f"{key}_high"] for row in rows]
    if rows and all(row.get(f"{key}_se") is not None for row in rows):
        spread = [1.96 * row[f"{key}_se"] for row in rows]
        low = [max(row[key] - s, row[key] / 10) for row, s in zip(rows, spread, strict=True)]
        return low, [row[key] + s for row, s in zip(rows, spread, strict=True)]
    return None


def search_figure(searches: Rows, most: int = 24):
    """A panel a search: what every scale gained over staying, with two standard errors of the paired gain, and where
    the model went (dashed). The first `most` searches with a candidate; `None` if there is none.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    drawn = [row for row in searches if len(_scored(row)) > 1 and row["trials"][0] in _scored(row)][:most]
    if not drawn:
        return None
    columns, lines = 6, math.ceil(len(drawn) / 6)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=(11, 0.4 + 1.7 * lines), constrained_layout=True, squeeze=False
    )
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, drawn, strict=False):
        start = _score(row["trials"][0])
        points = sorted(_scored(row), key=lambda trial: trial["scale"])
        scales, gains = [trial["scale"] for trial in points], [paired_gain(_score(trial), start) for trial in points]
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.errorbar(
            scales,
            [mean for mean, _ in gains],
            yerr=[2 * error for _, error in gains],
            color="#2e6f9e",
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            elinewidth=0.9,
        )
        axis.axvline(row["accepted_scale"], color="#d1495b", linestyle="--", linewidth=1.2)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(
            f"step {row['step']}: " + (f"{row['accepted_scale']:.3g}Δ" if row["accepted_scale"] else "stays")
        )
        axis.tick_params(labelsize=6.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("gain")
    figure.supxlabel("scale s of the candidate W + sΔ", fontsize=8.5)
    return figure


def _scored(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [trial for trial in row["trials"] if trial.get("score") is not None]


def _score(trial: Mapping[str, Any]) -> Score:
    return Score(trial["score"], tuple(trial.get("per_example") or ()))


def training_figure(runs: Mapping[str, Rows]):
    """What every step logged, a panel a value; `None` if nothing was.

    Args:
        runs: rows of `metrics.jsonl` by label.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [key for key in LOGGED if any(key in row for rows in runs.values() for row in rows)]
    if not shown:
        return None
    lines = math.ceil(len(shown) / 3)
    figure, axes = pyplot().subplots(
        lines, 3, figsize=(11, 0.4 + 2.1 * lines), sharex=True, constrained_layout=True, squeeze=False
    )
    colors = group_colors(runs)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, shown, strict=False):
        for label, all_rows in runs.items():
            rows = [row for row in all_rows if row.get(key) is not None]
            axis.plot(
                [row["step"] for row in rows],
                [row[key] for row in rows],
                color=colors[label],
                linewidth=1.4,
                label=label,
            )
        axis.set_title(LOGGED[key])
        if key in ("health/reverse_kl", "grad_norm", "learning_rate"):
            axis.set_yscale("log")
    if len(runs) > 1:
        axes[0][0].legend()
    figure.supxlabel("optimizer steps", fontsize=8.5)
    return figure
