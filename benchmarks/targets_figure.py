"""Figure of docs/batch_size.md: how many times cheaper `newton_search` is, against the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_size import prompts_of, reuse_arms, reuse_label, same_prompts
from rivals import FEW_SHARES, Hindsight, priced

from effopd.common.optional import require
from effopd.report.compare_lookup import Lookup
from effopd.report.style import MUTED, group_colors, legend_beside, quiet_style, save

NOTE = (
    "Priced cost of the fastest tuned run with the same number of prompts, chosen in hindsight for each target, "
    "divided by that of newton_search; medians over seeds. Line: started from 3e-05. Band: all starting rates. Prices "
    "of a 1.7B student and an 8B teacher on one H100, searches included."
)
#: Drawn in the place of 0 (most runs of newton_search do not arrive) and ∞ (no tuned run does).
NEVER, ALONE = 0.4, 4.0
#: Panels side by side.
COLUMNS = 2


def draw(grids: Sequence[Mapping[str, Any]], early: Mapping[str, Any], path: Path) -> None:
    """One panel per task of the grids, one color per number of prompts.

    Args:
        grids: results.json of the grids.
        early: see `rivals.Hindsight`.
        path: file of the figure.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    panels = [(results, task) for results in grids for task in Lookup(results).tasks]
    arms = sorted({arm for results in grids for arm in shown_arms(results)}, key=lambda arm: int(prompts_of(arm)))
    colors = group_colors(list(dict.fromkeys(map(label_of, arms))))
    rows = -(-len(panels) // COLUMNS)
    with quiet_style():
        figure, axes = plt.subplots(
            rows, COLUMNS, figsize=(4.6 * COLUMNS, 3.4 * rows), constrained_layout=True, sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis, (results, task) in zip(axes.flat, panels, strict=True):
            for arm in (each for each in arms if each in shown_arms(results)):
                if values := factors(results, early, task, arm):
                    color, (main, low, high) = colors[label_of(arm)], values
                    axis.plot(FEW_SHARES, main, color=color, marker="o", markersize=4, label=label_of(arm))
                    axis.fill_between(FEW_SHARES, low, high, color=color, alpha=0.15, linewidth=0)
            dress(axis, task)
        for row in axes:
            row[0].set_ylabel("times cheaper than the\nfastest tuned run")
        for axis in axes[-1]:
            axis.set_xlabel("target: held-out KL, share of its start")
        legend_beside(figure, axes.flat)
        save(figure, path, "newton_search without tuning against tuned runs with as many prompts", NOTE)
        plt.close(figure)


def shown_arms(results: Mapping[str, Any]) -> list[str]:
    """The look-ahead of every number of prompts; with TOPD if it ran, as its rivals have it."""
    arms: dict[str, str] = {}
    for arm in reuse_arms(Lookup(results)):
        if "-topd" in arm or prompts_of(arm) not in arms:
            arms[prompts_of(arm)] = arm
    return list(arms.values())


def label_of(arm: str) -> str:
    """`16 prompts` or `8 prompts, replay, TOPD`."""
    return reuse_label(arm).replace(prompts_of(arm), f"{prompts_of(arm)} prompts", 1)


def factors(
    results: Mapping[str, Any], early: Mapping[str, Any], task: str, arm: str
) -> tuple[list[float], list[float], list[float]] | None:
    """From the reference rate, lowest and highest over the starting rates; one value per target."""
    look = Lookup(results)
    known = Hindsight(results, priced, same_prompts(results, arm), early)
    if not look.runs(task, (arm, look.reference)):
        return None
    rows = []
    for share in FEW_SHARES:
        leads = [known.lead(task, each, share) for each in known.ran(task, arm)]
        arrived = [lead for lead in leads if not math.isnan(lead)]
        ends = (min(arrived, default=math.nan), max(arrived, default=math.nan))
        rows.append([inside(lead) for lead in (known.lead(task, (arm, look.reference), share), *ends)])
    main, low, high = map(list, zip(*rows, strict=True))
    return main, low, high


def inside(lead: float) -> float:
    """The factor within the axis; NaN, which draws nothing, stays."""
    return lead if math.isnan(lead) else min(max(lead, NEVER), ALONE)


def dress(axis: Any, task: str) -> None:
    """Scales, ticks and title of a panel."""
    axis.axhline(1, color=MUTED, linewidth=1)
    axis.set(xscale="log", yscale="log", xlim=(0.56, 0.022), ylim=(NEVER * 0.95, ALONE * 1.06))
    axis.set_xticks(FEW_SHARES, [f"{100 * share:g} %" for share in FEW_SHARES])
    axis.set_yticks(
        [NEVER, 0.5, 0.7, 1, 1.5, 2, 3, ALONE], ["never", "0.5×", "0.7×", "1×", "1.5×", "2×", "3×", "only it"]
    )
    axis.minorticks_off()
    axis.set_title(task.split(":")[1], loc="left")
