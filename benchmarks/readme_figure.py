"""The README's figure: held-out KL against priced seconds, `newton_search` and tuned baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rivals import priced

from effopd.common.optional import require
from effopd.compare.time_to_target import smooth
from effopd.report.compare_lookup import Lookup
from effopd.report.style import looks, quiet_style, save

NOTE = (
    "Three updates per batch of rollouts, 1024 held-out prompts. newton_search: 8 prompts, replay; shaded from 3e-05: "
    "lowest to highest seed. Median over two to three seeds, trailing median of three evaluations. Priced seconds: "
    "tokens at the prices of a 1.7B student and an 8B teacher on one H100, searches included. Logarithmic axes: a "
    "speed-up is a shift to the left."
)
LOOK_AHEAD = "newton_search-schedule-free-3-replay-prompts-8"
#: Curves: label → (strategy, learning rate, line width). `None`: the rate with most seeds.
ARMS = {
    "clipped AdamW, 8 prompts": ("clip-0.1-updates-3-prompts-8", None, 1.1),
    "clipped AdamW, 8 prompts, replay": ("clip-0.1-updates-3-replay-prompts-8", None, 1.1),
    "schedule-free AdamW, 8 prompts": ("schedule-free-tuned-3-prompts-8", None, 1.1),
    "schedule-free AdamW, 16 prompts": ("schedule-free-tuned-3-prompts-16", None, 1.1),
    "clipped AdamW, 32 prompts": ("clip-0.1-updates-3-prompts-32", None, 1.1),
    "schedule-free AdamW, 32 prompts": ("schedule-free-tuned-3-prompts-32", None, 1.1),
    "newton_search from 3e-05": (LOOK_AHEAD, 3e-5, 2.2),
    "newton_search from 3e-06": (LOOK_AHEAD, 3e-6, 2.2),
    "newton_search from 3e-04": (LOOK_AHEAD, 3e-4, 2.2),
}


def draw(grids: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one panel per grid, each of one task."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    styles = looks({label: "newton_search" if s == LOOK_AHEAD else s for label, (s, _, _) in ARMS.items()})
    with quiet_style():
        figure, axes = plt.subplots(1, len(grids), figsize=(11, 4.4), constrained_layout=True, sharey=True)
        for axis, results in zip(axes, grids, strict=True):
            look = Lookup(results)
            (task,) = look.tasks
            for label, (strategy, rate, width) in ARMS.items():
                runs = [run["curve"] for run in look.runs(task, _arm(look, task, strategy, rate))]
                if len(runs) < 2:  # one seed is no median
                    continue
                x, median, low, high = band(runs)
                color = styles[label].light
                dashes = styles[label].dash.split() and tuple(map(float, styles[label].dash.split()))
                axis.plot(x, median, color=color, label=label, linewidth=width, dashes=dashes or (None, None))
                if (strategy, rate) == (LOOK_AHEAD, look.reference):
                    axis.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("priced seconds")
            axis.set_title(task.split(":")[1], loc="left")
        drawn = {}
        for axis in axes:
            drawn |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        labels = {label: drawn[label] for label in ARMS if label in drawn}
        axes[0].legend(labels.values(), labels.keys(), frameon=False, fontsize=8, loc="lower left")
        axes[0].set_ylabel("held-out reverse KL\n(nats per token)")
        save(figure, path, "newton_search from three learning rates, and tuned runs without it", NOTE)
        plt.close(figure)


def _arm(look: Lookup, task: str, strategy: str, rate: float | None) -> tuple[str, float]:
    """The grid's arm with this rate up to rounding, or of this strategy with most seeds."""
    arms = [arm for arm in look.arms if arm[0] == strategy]
    if rate is not None:
        arms = [arm for arm in arms if math.isclose(arm[1], rate, rel_tol=1e-6)]
    return max(arms, key=lambda arm: len(look.runs(task, arm)), default=(strategy, rate or math.nan))


def band(curves: Sequence[Mapping[str, list[float]]]) -> tuple[np.ndarray, ...]:
    """Priced seconds, and the median, lowest and highest smoothed KL of several runs."""
    costs = [priced(curve) for curve in curves]
    seconds = np.geomspace(max(cost[1] for cost in costs), min(cost[-1] for cost in costs), 300)
    values = [[math.inf if kl is None else kl for kl in curve["kl"]] for curve in curves]
    kl = np.array([np.interp(seconds, cost, smooth(value)) for cost, value in zip(costs, values, strict=True)])
    return seconds, np.median(kl, axis=0), kl.min(axis=0), kl.max(axis=0)
