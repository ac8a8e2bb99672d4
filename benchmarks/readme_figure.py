"""The README's figure: held-out KL against net seconds, `newton_search` and tuned baselines."""

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
    "32 prompts per step. Median over three to five seeds; shaded for newton_search from 3e-05: "
    "lowest to highest. Trailing median of three evaluations. Net seconds: CPU seconds without evaluation, searches "
    "included. Logarithmic axes: a speed-up is a shift to the left."
)
#: Curves: label → (strategy, learning rate, line width).
ARMS = {
    "plain OPD, 9e-05": ("plain", 9e-5, 1.1),
    "plain OPD, 1.5e-04": ("plain", 1.5e-4, 1.1),
    "plain OPD, 3e-04": ("plain", 3e-4, 1.1),
    "gradient clipped at 0.1, 3e-04": ("clip-0.1", 3e-4, 1.1),
    "schedule-free AdamW, 9e-04": ("schedule-free-tuned", 9e-4, 1.1),
    "newton_search from 3e-05": ("newton_search", 3e-5, 2.2),
    "newton_search from 3e-06": ("newton_search", 3e-6, 2.2),
    "newton_search from 3e-04": ("newton_search", 3e-4, 2.2),
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw one panel per task."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    look = Lookup(results)
    styles = looks({label: strategy for label, (strategy, _, _) in ARMS.items()})
    with quiet_style():
        figure, axes = plt.subplots(1, len(look.tasks), figsize=(11, 4), constrained_layout=True, sharey=True)
        for axis, task in zip(axes, look.tasks, strict=True):
            for label, (strategy, rate, width) in ARMS.items():
                runs = [run["curve"] for run in look.runs(task, _arm(look, strategy, rate))]
                if len(runs) < 2:  # one seed is no median
                    continue
                x, median, low, high = band(runs)
                color = styles[label].light
                dashes = styles[label].dash.split() and tuple(map(float, styles[label].dash.split()))
                axis.plot(x, median, color=color, label=label, linewidth=width, dashes=dashes or (None, None))
                if (strategy, rate) == ("newton_search", look.reference):
                    axis.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("net seconds")
            axis.set_title(task.split(":")[1], loc="left")
        axes[0].legend(frameon=False, fontsize=8, loc="lower left")
        axes[0].set_ylabel("held-out reverse KL\n(nats per token)")
        save(
            figure,
            path,
            "newton_search from three learning rates, and tuned runs without it",
            NOTE,
        )
        plt.close(figure)


def _arm(look: Lookup, strategy: str, rate: float) -> tuple[str, float]:
    """The grid's arm with this rate up to rounding."""
    return next(
        (arm for arm in look.arms if arm[0] == strategy and math.isclose(arm[1], rate, rel_tol=1e-6)), (strategy, rate)
    )


def band(curves: Sequence[Mapping[str, list[float]]]) -> tuple[np.ndarray, ...]:
    """Net seconds, and the median, lowest and highest smoothed KL of several runs."""
    first = max(curve["seconds"][1] for curve in curves)
    seconds = np.geomspace(first, min(curve["seconds"][-1] for curve in curves), 300)
    values = [[math.inf if kl is None else kl for kl in curve["kl"]] for curve in curves]
    kl = np.array([np.interp(seconds, curve["seconds"], smooth(v)) for curve, v in zip(curves, values, strict=True)])
    return seconds, np.median(kl, axis=0), kl.min(axis=0), kl.max(axis=0)
