"""Figures of a comparison, drawn from results.json: speed-ups, curves, learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.common.optional import require
from effopd.compare.axes import axis_name
from effopd.report import envelope_figure
from effopd.report.compare_charts import band, curve_strategies, strategy_looks
from effopd.report.compare_lookup import FEW, Lookup, factor
from effopd.report.style import MUTED, group_colors, legend_beside, quiet_style, save

#: More curves than this hide each other.
_MAX_CURVES = 8


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw all figures that have data; return their paths by name.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    lookup = Lookup(results)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with quiet_style():
        for name, axis in envelope_figure.figures(lookup).items():
            figure = envelope_figure.draw_axis(plt, lookup, axis)
            title = f"Speed-up over the best-tuned run without look-ahead, in {axis_name(axis)}"
            drawn[name] = save(figure, folder / f"{name}.png", title, envelope_figure.note(lookup))
            plt.close(figure)
        for name, (make, title, note) in _FIGURES.items():
            figure = make(plt, lookup)
            if figure is not None:
                drawn[name] = save(figure, folder / f"{name}.png", title.format(baseline=lookup.baseline), note)
                plt.close(figure)
    return drawn


def strategy_colors(lookup: Lookup) -> dict[str, str]:
    """Color of every strategy on a light ground."""
    return {name: look.light for name, look in strategy_looks(lookup).items()}


def _curves(plt, lookup: Lookup):
    """Held-out KL against steps and net seconds: median over seeds, band from lowest to highest.

    The axes are logarithmic, so a speed-up is a shift to the left. A strategy that did not run at
    the reference rate is drawn at another one (`Lookup.drawn_rates`), which its label names.
    """
    rates = lookup.drawn_rates()
    strategies = curve_strategies(lookup)[:_MAX_CURVES]
    strategies = [name for name in rates if name in strategies]
    colors = strategy_colors(lookup)
    figure, axes = plt.subplots(
        len(lookup.tasks), 2, figsize=(11, 3.8 * len(lookup.tasks)), squeeze=False, constrained_layout=True
    )
    for row, task in enumerate(lookup.tasks):
        for column, (key, costs) in enumerate((("step", "optimizer steps"), ("seconds", "net seconds"))):
            axis = axes[row][column]
            for strategy in strategies:
                rate = rates[strategy]
                curves = [run["curve"] for run in lookup.runs(task, (strategy, rate))]
                if not curves:
                    continue
                x, median, low, high = band(curves, key, 200)
                if not x:
                    continue
                # dashed and on top, because a no-op strategy coincides with it
                base = {"linestyle": "--", "zorder": 5} if strategy == lookup.baseline else {}
                label = strategy if rate == lookup.reference else f"{strategy}, {factor(rate, lookup.reference)}"
                axis.plot(x, median, color=colors[strategy], label=label, linewidth=1.6, **base)
                axis.fill_between(x, low, high, color=colors[strategy], alpha=0.12, linewidth=0)
            axis.set_yscale("log")
            axis.set_xscale("log")
            axis.set_xlabel(costs)
            axis.set_title(task, loc="left")
        axes[row][0].set_ylabel("held-out reverse KL (nats per token)")
    legend_beside(figure, axes.flat)
    return figure


def _forest(plt, lookup: Lookup):
    """Speed-ups of all strategies at the reference learning rate, one panel per cost axis."""
    strategies = lookup.compared()
    if not strategies:
        return None
    colors = group_colors(lookup.tasks)
    panels = (("steps", "steps"), ("seconds", "net seconds"), ("generated_tokens", "sampled tokens"))
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 1.2 + 0.42 * len(strategies)), sharey=True, sharex=True, constrained_layout=True
    )
    floor, ceiling = 0.2, 30.0
    for axis, (name, label) in zip(axes, panels, strict=True):
        axis.axvline(1, color=MUTED, linewidth=1)
        for index, strategy in enumerate(strategies):
            for offset, task in enumerate(lookup.tasks):
                row = lookup.speedup(task, (strategy, lookup.reference), name)
                if row is not None and row["n"]:
                    y = -index - 0.22 * (offset - (len(lookup.tasks) - 1) / 2)
                    _whisker(axis, row, y, colors[task], floor, ceiling)
        axis.set_xscale("log")
        axis.set_xlim(floor, ceiling)
        axis.set_xticks([0.25, 0.5, 1, 2, 5, 10, 20], ["¼", "½", "1×", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.set_xlabel(f"speed-up in {label}")
    axes[0].set_yticks([-i for i in range(len(strategies))], strategies)
    for task in lookup.tasks:
        axes[0].plot([], [], "o", color=colors[task], label=task)
    axes[0].plot([], [], "<", color=MUTED, markerfacecolor="none", label="median: never arrives")
    figure.legend(loc="outside upper right", ncols=len(lookup.tasks) + 1, frameon=False, fontsize=8)
    return figure


def _whisker(axis, row, y: float, color: str, floor: float, ceiling: float) -> None:
    low, median, high = (math.inf if row[k] is None else row[k] for k in ("low", "median", "high"))
    inner = color if row["n"] >= FEW else "white"
    inside = [min(max(value, floor * 1.06), ceiling / 1.06) for value in (low, median, high)]
    axis.plot([inside[0], inside[2]], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
    if low < floor:
        axis.plot(inside[0], y, marker="<", color=color, markersize=4)
    if high > ceiling:
        axis.plot(inside[2], y, marker=">", color=color, markersize=4)
    if median < floor:
        axis.plot(inside[1], y, marker="<", color=color, markersize=8, markerfacecolor="white")
    else:
        axis.plot(
            inside[1], y, marker="o" if median < ceiling else ">", color=color, markerfacecolor=inner, markersize=6
        )


def _rates(plt, lookup: Lookup):
    """Net seconds to the reference target by learning rate; runs that miss it are at the top."""
    swept = lookup.swept_to_target()
    if not swept:
        return None
    colors, ticks = strategy_colors(lookup), require("matplotlib.ticker")
    figure, axes = plt.subplots(
        1, len(lookup.tasks), figsize=(5.5 * len(lookup.tasks), 3.8), squeeze=False, constrained_layout=True
    )
    for axis, task in zip(axes[0], lookup.tasks, strict=True):
        points = {
            (s, rate): [run["targets"]["reference_kl"]["seconds"] for run in lookup.runs(task, (s, rate))
                        if "reference_kl" in run["targets"]]
            for s, rate in lookup.arms if s in swept
        }  # fmt: skip
        seen = [value for values in points.values() for value in values if value is not None]
        top = 1.6 * max(seen, default=1.0)
        for strategy in swept:
            rates = sorted(rate for s, rate in points if s == strategy and points[s, rate])
            medians = [statistics.median([v or math.inf for v in points[strategy, rate]]) for rate in rates]
            axis.plot(rates, [min(m, top) for m in medians], color=colors[strategy], label=strategy, linewidth=1.6)
            for rate in rates:
                for value in points[strategy, rate]:
                    axis.plot(
                        rate, top if value is None else value, marker="x" if value is None else "o",
                        color=colors[strategy], markersize=5, alpha=0.7,
                    )  # fmt: skip
        axis.axhline(top, color=MUTED, linewidth=0.8, linestyle=":")
        axis.annotate(" never", (1, top), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticks.NullFormatter())
        axis.set_xlabel("learning rate")
        axis.set_title(task, loc="left")
    axes[0][0].set_ylabel("net seconds to the baseline's final KL\nat the reference learning rate")
    legend_beside(figure, axes.flat)
    return figure


#: Name → (drawing function, title, note).
_FIGURES = {
    "speedups": (
        _forest,
        "Net speed-up to the final held-out KL of {baseline}",
        "Reference learning rate. Median over seeds with 95 % interval; hollow: fewer than five seeds, with their "
        "range. Arrows: beyond the axis; at the left also “never”.",
    ),
    "curves": (
        _curves,
        "Held-out KL, reference learning rate",
        "Smoothed. Line: median over seeds; shaded: lowest to highest. Curves end with the shortest run.",
    ),
    "learning_rates": (
        _rates,
        "Time to target by learning rate",
        "Points: single seeds; crosses: never arrives; line: median over seeds.",
    ),
}
