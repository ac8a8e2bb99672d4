"""Figures of a run: held-out KL and accuracy, gain by scale of every search, logged values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from effopd.common.optional import require
from effopd.extrapolate.search import Score, paired_gain
from effopd.report.style import INK, MARKERS, MUTED, group_colors
from effopd.runs.records import EvaluationRecord, SearchRecord, StepRecord, TrialRecord

#: Attribute of a `StepRecord` → title of its panel.
LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "learning_rate": "learning rate",
    "health.reverse_kl": "reverse KL on fresh rollouts",
    "health.overlap_ratio": "top-k overlap with the teacher",
    "entropy": "student's entropy, nats",
    "mean_length": "tokens per answer",
    "clipped_share": "answers cut at the limit",
    "grad_norm": "gradient norm",
}
#: Attribute of an `EvaluationRecord` → label of its axis.
_QUALITY = {
    "kl": "held-out reverse KL to the teacher\n(nats per token, 95 % interval)",
    "accuracy": "held-out accuracy\n(95 % interval)",
}


def pyplot():
    """matplotlib's pyplot with the file backend Agg.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


def quality_figure(
    runs: Mapping[str, Sequence[EvaluationRecord]],
    searches: Mapping[str, Sequence[SearchRecord]],
    target: float | None = None,
    teacher_accuracy: float | None = None,
    colors: Mapping[str, str] | None = None,
    seconds: str = "net seconds",
):
    """Held-out KL and accuracy (rows of panels) against optimizer steps and net seconds (columns).

    `None` if neither was measured.

    Args:
        runs: evaluations by label.
        searches: searches by label; accepted forward jumps are marked on the curves.
        target: KL of a horizontal line. `None`: no line.
        teacher_accuracy: accuracy of a horizontal line. `None`: no line.
        colors: color by label; other labels get a palette color.
        seconds: name of the runs' clock, for the axis label.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [
        key for key in _QUALITY if any(getattr(record, key) is not None for run in runs.values() for record in run)
    ]
    if not shown:
        return None
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
    axis_of: Sequence[tuple[str, Callable[[EvaluationRecord], float]]] = (
        ("optimizer steps", attrgetter("step")),
        (f"{seconds} (search charged, evaluation not)", attrgetter("costs.net_seconds")),
    )
    for panels, key in zip(axes, shown, strict=True):
        for axis, (_, x_of) in zip(panels, axis_of, strict=True):
            for i, (label, evaluations) in enumerate(runs.items()):
                measured = [record for record in evaluations if getattr(record, key) is not None]
                jumps = [search.step for search in searches.get(label, ()) if search.accepted_scale > 0]
                style = {"color": colors[label], "marker": MARKERS[i % len(MARKERS)], "label": label}
                _curve(axis, measured, key, x_of, jumps, style)
        panels[0].set_ylabel(_QUALITY[key])
        line, name = (target, "target") if key == "kl" else (teacher_accuracy, "teacher")
        for axis in panels:
            if key == "kl":
                axis.set_yscale("log")
            if line is not None:
                axis.axhline(line, color=MUTED, linestyle=":", linewidth=1.2, label=name)
        if any(search.accepted_scale > 0 for run in searches.values() for search in run):
            panels[0].plot([], [], marker="^", color=INK, linestyle="", label="jump")
        panels[0].legend()
    for axis, (name, _) in zip(axes[-1], axis_of, strict=True):
        axis.set_xlabel(name)
    return figure


def _curve(
    axis,
    evaluations: Sequence[EvaluationRecord],
    key: str,
    x_of: Callable[[EvaluationRecord], float],
    jumps: Iterable[int],
    style: Mapping[str, Any],
) -> None:
    """One point per evaluation with its interval; a triangle at the first one after each jump."""
    x, y = [x_of(record) for record in evaluations], [getattr(record, key) for record in evaluations]
    axis.plot(x, y, linewidth=1.1, markersize=3.5 if len(evaluations) <= 60 else 2, **style)
    if interval := _interval(evaluations, key):
        axis.fill_between(x, *interval, color=style["color"], alpha=0.12, linewidth=0)
    steps = [record.step for record in evaluations]
    first_after = {next((i for i, other in enumerate(steps) if other >= step), None) for step in jumps} - {None}
    marked = sorted(i for i in first_after if i is not None)
    axis.plot(
        [x[i] for i in marked], [y[i] for i in marked], "^", color=style["color"], markersize=8,
        markeredgecolor=INK, markeredgewidth=0.8, zorder=5,
    )  # fmt: skip


def _interval(evaluations: Sequence[EvaluationRecord], key: str) -> tuple[list[float], list[float]] | None:
    """Ends of the 95 % interval of accuracy or KL (± 1.96 standard errors, at least KL/10)."""
    columns = ("accuracy", "accuracy_low", "accuracy_high") if key == "accuracy" else ("kl", "kl_se")
    rows = [attrgetter(*columns)(record) for record in evaluations]
    if not rows or any(value is None for row in rows for value in row):
        return None
    if key == "accuracy":
        return [low for _, low, _ in rows], [high for _, _, high in rows]
    return [max(kl - 1.96 * se, kl / 10) for kl, se in rows], [kl + 1.96 * se for kl, se in rows]


def search_figure(searches: Sequence[SearchRecord], most: int = 24):
    """One panel per search: paired gain of every scale over s = 0, ± 2 standard errors.

    The accepted scale is dashed. Shows the first `most` searches with a scored candidate; `None` if
    there is none.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    drawn = [search for search in searches if search.start_score is not None and len(_scored(search)) > 1][:most]
    if not drawn:
        return None
    columns, lines = 6, math.ceil(len(drawn) / 6)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=(11, 0.4 + 1.7 * lines), constrained_layout=True, squeeze=False
    )
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    for axis, search in zip(axes.flat, drawn, strict=False):
        start = _score(search.trials[0])
        points = sorted(_scored(search), key=attrgetter("scale"))
        scales, gains = [trial.scale for trial in points], [paired_gain(_score(trial), start) for trial in points]
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
        axis.axvline(search.accepted_scale, color="#d1495b", linestyle="--", linewidth=1.2)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        outcome = f"{search.accepted_scale:.3g}Δ" if search.accepted_scale else "stays"
        axis.set_title(f"step {search.step}: {outcome}")
        axis.tick_params(labelsize=6.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("gain")
    figure.supxlabel("scale s of the candidate W + sΔ", fontsize=8.5)
    return figure


def _scored(search: SearchRecord) -> list[TrialRecord]:
    return [trial for trial in search.trials if trial.score is not None]


def _score(trial: TrialRecord) -> Score:
    assert trial.score is not None
    return Score(trial.score, trial.per_example or ())


def training_figure(runs: Mapping[str, Sequence[StepRecord]]):
    """Logged values over steps, one panel per value; `None` if nothing was logged.

    Args:
        runs: logged steps by label.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [key for key in LOGGED if any(attrgetter(key)(step) is not None for run in runs.values() for step in run)]
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
        for label, steps in runs.items():
            values = {step.step: attrgetter(key)(step) for step in steps}
            points = {step: value for step, value in values.items() if value is not None}
            axis.plot(list(points), list(points.values()), color=colors[label], linewidth=1.4, label=label)
        axis.set_title(LOGGED[key])
        if key in ("health.reverse_kl", "grad_norm", "learning_rate"):
            axis.set_yscale("log")
    if len(runs) > 1:
        axes[0][0].legend()
    figure.supxlabel("optimizer steps", fontsize=8.5)
    return figure
