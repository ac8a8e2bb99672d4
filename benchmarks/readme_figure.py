"""The README's figure: held-out KL against net seconds, with plain OPD at two learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effopd.common.optional import require
from effopd.compare.time_to_target import smooth
from effopd.report.compare_lookup import Lookup
from effopd.report.style import looks, quiet_style, save

NOTE = (
    "Median over five seeds, shaded: lowest to highest; trailing median of three evaluations. "
    "Net seconds: CPU seconds without evaluation, searches included. Dotted: plain OPD's final KL at the low rate."
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw one panel per task with four curves."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    look = Lookup(results)
    with quiet_style():
        figure, axes = plt.subplots(1, len(look.tasks), figsize=(11, 3.6), constrained_layout=True, sharey=True)
        for axis, task in zip(axes, look.tasks, strict=True):
            best = look.best(task)
            arms = {
                f"plain OPD, {look.reference:.0e}": (look.baseline, look.reference, "-"),
                f"plain OPD, best of {len(results['swept'][task])} rates ({best:.0e})": (look.baseline, best, "--"),
                f"EffOPD (the paper), {look.reference:.0e}": ("effopd", look.reference, "-"),
                f"line_search (ours), {look.reference:.0e}": ("line_search", look.reference, "-"),
            }
            styles = looks({label: strategy for label, (strategy, _, _) in arms.items()})
            for label, (strategy, rate, line) in arms.items():
                color = styles[label].light
                x, median, low, high = band([run["curve"] for run in look.runs(task, (strategy, rate))])
                axis.plot(x, median, line, color=color, label=label, linewidth=1.8)
                axis.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
                if (strategy, rate) == (look.baseline, look.reference):
                    axis.axhline(median[-1], color=color, linestyle=":", linewidth=1)
            axis.set_yscale("log")
            axis.set_xlim(left=0)
            axis.set_xlabel("net seconds")
            axis.set_title(task.split(":")[1], loc="left")
            axis.legend(frameon=False)
        axes[0].set_ylabel("held-out reverse KL\n(nats per token)")
        save(figure, path, "Distance to the teacher", NOTE)
        plt.close(figure)


def band(curves: Sequence[Mapping[str, list[float]]]) -> tuple[np.ndarray, ...]:
    """Net seconds, and the median, lowest and highest smoothed KL of several runs."""
    seconds = np.linspace(0, min(curve["seconds"][-1] for curve in curves), 300)
    values = [[math.inf if kl is None else kl for kl in curve["kl"]] for curve in curves]
    kl = np.array([np.interp(seconds, curve["seconds"], smooth(v)) for curve, v in zip(curves, values, strict=True)])
    return seconds, np.median(kl, axis=0), kl.min(axis=0), kl.max(axis=0)
