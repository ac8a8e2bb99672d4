"""The demo's figure: its runs against steps and against net seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effopd.bench.time_to_target import smooth
from effopd.optional import require

Rows = Sequence[Mapping[str, Any]]
_COLORS = {"plain OPD": "#4c566a", "EffOPD": "#d1495b", "lookahead": "#2e6f9e"}


def comparison_figure(
    runs: Mapping[str, Rows],
    searches: Mapping[str, Rows],
    target: float,
    path: Path,
    title: str,
    teacher_accuracy: float | None,
) -> Path:
    """Held-out KL (top) and accuracy (bottom) against optimizer steps (left) and net seconds (right).

    Args:
        runs: rows of `evals.jsonl` by label.
        searches: rows of `searches.jsonl` by label; accepted jumps forwards are marked on the curves.
        target: the KL that decides the speed-up, drawn as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharey="row", sharex="col", constrained_layout=True)
    jumps = {label: [row["step"] for row in rows if row["accepted_scale"] > 0] for label, rows in searches.items()}
    for column, x_of in enumerate((lambda row: row["step"], lambda row: row["cost/net_seconds"])):
        for label, rows in runs.items():
            x = [x_of(row) for row in rows]
            color = _COLORS.get(label)
            top, bottom = axes[0][column], axes[1][column]
            kl = [row["eval_kl"] for row in rows]
            top.plot(x, kl, color=color, alpha=0.3, linewidth=1)
            top.plot(x, smooth(kl), color=color, linewidth=2, label=label)
            bottom.plot(x, [row["eval_accuracy"] for row in rows], color=color, linewidth=2, label=label)
            low, high = ([row[f"eval_accuracy_{end}"] for row in rows] for end in ("low", "high"))
            bottom.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            _mark_jumps(axes[0][column], axes[1][column], rows, x_of, jumps.get(label, []), color)
        axes[0][column].axhline(target, color="#4c566a", linestyle=":", linewidth=1, label="plain OPD's final KL")
        if teacher_accuracy is not None:
            axes[1][column].axhline(teacher_accuracy, color="#2a9d8f", linestyle=":", linewidth=1, label="teacher")
    axes[0][0].plot([], [], marker="^", color="#4c566a", linestyle="", label="accepted jump")
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("held-out reverse KL to the teacher\n(nats per token)")
    axes[1][0].set_ylabel("held-out accuracy at temperature 1\n(95 % interval)")
    axes[1][0].set_xlabel("optimizer steps")
    axes[1][1].set_xlabel("net seconds (search charged, evaluation not)")
    axes[0][0].legend(frameon=False)
    axes[1][0].legend(frameon=False, loc="lower right")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _mark_jumps(top, bottom, rows: Rows, x_of, steps: Iterable[int], color: str | None) -> None:
    """A triangle at the first evaluation at or after each accepted jump."""
    for index in sorted({next((i for i, row in enumerate(rows) if row["step"] >= step), -1) for step in steps} - {-1}):
        kl = smooth([row["eval_kl"] for row in rows[: index + 1]])[-1]
        for axis, y in ((top, kl), (bottom, rows[index]["eval_accuracy"])):
            axis.plot([x_of(rows[index])], [y], marker="^", color=color, markersize=8, zorder=5)
