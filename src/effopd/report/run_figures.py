"""Figure of runs for documents: held-out KL and accuracy, by steps and net seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from effopd.common.optional import require
from effopd.report.style import INK, MUTED, Look, looks
from effopd.runs.records import EvaluationRecord, SearchRecord

#: Attribute of an `EvaluationRecord` → label of its axis.
QUALITY = {
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
    styles: Mapping[str, Look] | None = None,
    seconds: str = "net seconds",
):
    """Held-out KL and accuracy (rows of panels) against optimizer steps and net seconds (columns).

    `None` if neither was measured.

    Args:
        runs: evaluations by label.
        searches: searches by label; accepted forward jumps are marked on the curves.
        target: KL of a horizontal line. `None`: no line.
        teacher_accuracy: accuracy of a horizontal line. `None`: no line.
        styles: look by label. `None`: that of the strategy with the label's name.
        seconds: name of the runs' clock, for the axis label.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [
        key for key in QUALITY if any(getattr(record, key) is not None for run in runs.values() for record in run)
    ]
    if not shown:
        return None
    styles = styles or looks({label: label for label in runs})
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
            for label, evaluations in runs.items():
                measured = [record for record in evaluations if getattr(record, key) is not None]
                _curve(axis, measured, key, x_of, jump_steps(searches.get(label, ())), label, styles[label])
        panels[0].set_ylabel(QUALITY[key])
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


def jump_steps(searches: Iterable[SearchRecord]) -> list[int]:
    """Steps of the accepted forward jumps."""
    return [search.step for search in searches if search.accepted_scale > 0]


def after_jumps(evaluations: Sequence[EvaluationRecord], jumps: Iterable[int]) -> list[int]:
    """Indices of the first evaluation at or after each jump."""
    steps = [record.step for record in evaluations]
    first = {next((i for i, other in enumerate(steps) if other >= step), None) for step in jumps}
    return sorted(i for i in first if i is not None)


def _curve(
    axis,
    evaluations: Sequence[EvaluationRecord],
    key: str,
    x_of: Callable[[EvaluationRecord], float],
    jumps: Iterable[int],
    label: str,
    look: Look,
) -> None:
    """One point per evaluation with its interval; a triangle at the first one after each jump."""
    x, y = [x_of(record) for record in evaluations], [getattr(record, key) for record in evaluations]
    size = 3.5 if len(evaluations) <= 60 else 2
    line = {"color": look.light, "linestyle": look.linestyle, "marker": look.marker}
    axis.plot(x, y, label=label, linewidth=1.1, markersize=size, **line)
    if ends := interval(evaluations, key):
        axis.fill_between(x, *ends, color=look.light, alpha=0.12, linewidth=0)
    marked = after_jumps(evaluations, jumps)
    axis.plot(
        [x[i] for i in marked], [y[i] for i in marked], "^", color=look.light, markersize=8,
        markeredgecolor=INK, markeredgewidth=0.8, zorder=5,
    )  # fmt: skip


def interval(evaluations: Sequence[EvaluationRecord], key: str) -> tuple[list[float], list[float]] | None:
    """Ends of the 95 % interval of accuracy or KL (± 1.96 standard errors, at least KL/10)."""
    columns = ("accuracy", "accuracy_low", "accuracy_high") if key == "accuracy" else ("kl", "kl_se")
    rows = [attrgetter(*columns)(record) for record in evaluations]
    if not rows or any(value is None for row in rows for value in row):
        return None
    if key == "accuracy":
        return [low for _, low, _ in rows], [high for _, _, high in rows]
    return [max(kl - 1.96 * se, kl / 10) for kl, se in rows], [kl + 1.96 * se for kl, se in rows]
