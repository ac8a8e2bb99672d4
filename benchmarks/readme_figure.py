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
from effopd.report.style import MUTED, looks, quiet_style, save

NOTE = (
    "Three updates per batch of rollouts, 1024 held-out prompts. newton_search: 8 prompts; shaded from "
    "3e-05: lowest to highest seed. Median over two to five seeds, trailing median of three evaluations. Priced "
    "seconds: tokens at the prices of a 1.7B student and an 8B teacher on one H100, searches included. Logarithmic "
    "axes: a speed-up is a shift to the left."
)
LOOK_AHEAD = "newton_search-schedule-free-3-replay-topd-prompts-8"
RATES = (3e-5, 3e-6, 3e-4)
#: Arms without a look-ahead, each at all rates with several seeds. They share one color and label.
TUNED = (
    "clip-0.1-topd-updates-3-replay-prompts-8",
    "schedule-free-tuned-topd-3-replay-prompts-8",
    "clip-0.1-topd-updates-3-prompts-8",
    "clip-0.1-updates-3-prompts-8",
    "clip-0.1-updates-3-replay-prompts-8",
    "schedule-free-tuned-3-prompts-8",
    "schedule-free-tuned-3-prompts-16",
    "clip-0.1-updates-3-prompts-32",
    "schedule-free-tuned-3-prompts-32",
    "clip-0.1-updates-3-prompts-64",
    "schedule-free-tuned-3-prompts-64",
)
TUNED_LABEL = "tuned runs: AdamW and schedule-free\nAdamW, 8 to 64 prompts per batch"


def draw(grids: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one panel per grid, each of one task."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    styles = looks({f"newton_search from {rate:.0e}": "newton_search" for rate in RATES})
    with quiet_style():
        figure, axes = plt.subplots(1, len(grids), figsize=(11, 4.4), constrained_layout=True, sharey=True)
        for axis, results in zip(axes, grids, strict=True):
            look = Lookup(results)
            (task,) = look.tasks
            for strategy in TUNED:
                for rate in (arm[1] for arm in look.arms if arm[0] == strategy):
                    if curves := _curves(look, task, strategy, rate):
                        seconds, median, _, _ = band(curves)
                        axis.plot(seconds, median, color=MUTED, alpha=0.6, linewidth=1, label=TUNED_LABEL)
            for rate, (label, style) in zip(RATES, styles.items(), strict=True):
                if curves := _curves(look, task, LOOK_AHEAD, rate):
                    seconds, median, low, high = band(curves)
                    dashes = tuple(map(float, style.dash.split())) or (None, None)
                    axis.plot(seconds, median, color=style.light, label=label, linewidth=2.2, dashes=dashes)
                    if rate == look.reference:
                        axis.fill_between(seconds, low, high, color=style.light, alpha=0.13, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("priced seconds")
            axis.set_title(task.split(":")[1], loc="left")
        handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
        axes[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="lower left")
        axes[0].set_ylabel("held-out reverse KL\n(nats per token)")
        save(figure, path, "newton_search from three learning rates (purple) against tuned runs (gray)", NOTE)
        plt.close(figure)


def _curves(look: Lookup, task: str, strategy: str, rate: float) -> list[Mapping[str, list[float]]]:
    """Curves of a strategy at one rate; none of a single seed."""
    arms = [arm for arm in look.arms if arm[0] == strategy and math.isclose(arm[1], rate, rel_tol=1e-6)]
    runs = max((look.runs(task, arm) for arm in arms), key=len, default=[])
    return [run["curve"] for run in runs] if len(runs) > 1 else []


def band(curves: Sequence[Mapping[str, list[float]]]) -> tuple[np.ndarray, ...]:
    """Priced seconds, and the median, lowest and highest smoothed KL of several runs."""
    costs = [priced(curve) for curve in curves]
    seconds = np.geomspace(max(cost[1] for cost in costs), min(cost[-1] for cost in costs), 300)
    values = [[math.inf if kl is None else kl for kl in curve["kl"]] for curve in curves]
    kl = np.array([np.interp(seconds, cost, smooth(value)) for cost, value in zip(costs, values, strict=True)])
    return seconds, np.median(kl, axis=0), kl.min(axis=0), kl.max(axis=0)
