"""Figure: speed-up over the best-tuned run without look-ahead, against the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from effopd.report.compare_envelope import Part, axes_with_data, curves, interval, parts, shown
from effopd.report.compare_lookup import Lookup
from effopd.report.style import MUTED, Look, legend_beside, looks

_FLOOR, _CEILING = 0.1, 8.0
#: Largest number of strategies that all have a band; of more, only the first one has.
_BANDS = 2


def axes_of_figures(lookup: Lookup) -> list[str]:
    """Axes with a figure: those on which the cost of the first strategy shown is known."""
    return [axis for part in parts(lookup)[:1] for axis in axes_with_data(lookup, part, first=True)]


def draw_axis(plt: Any, lookup: Lookup, axis: str) -> Any:
    """One panel per envelope and task. Thick with a band: the reference rate; thin: other rates."""
    rows = [part for part in parts(lookup) if axis in axes_with_data(lookup, part)]
    figure, panels = plt.subplots(
        len(rows), len(lookup.tasks), figsize=(5.6 * len(lookup.tasks), 3.7 * len(rows)), squeeze=False,
        sharex=True, sharey=True, constrained_layout=True,
    )  # fmt: skip
    for part, line in zip(rows, panels, strict=True):
        names = shown(lookup, part)
        styles, bands = looks({name: name for name in names}), names if len(names) <= _BANDS else names[:1]
        for panel, task in zip(line, lookup.tasks, strict=True):
            for strategy in names:
                _strategy(panel, lookup, part, task, axis, strategy, styles[strategy], strategy in bands)
            _dress(panel, f"{task}: {opponents(part)}")
        line[0].set_ylabel("speed-up")
    legend_beside(figure, panels.flat)
    for panel in panels[-1]:
        panel.set_xlabel("target: held-out KL, share of its start")
    return figure


def note(lookup: Lookup) -> str:
    """Note below the figures."""
    methods = "; ".join(
        (f"with {part['label']}: " if part["label"] else "") + interval(lookup, part) for part in parts(lookup)
    )
    alone = ", here on the only seed itself" if any(len(part["seeds"]) == 1 for part in parts(lookup)) else ""
    return (
        f"Thick: reference learning rate. Band, of the first strategy if there are many: {methods}. Thin: the other "
        "learning rates, whose intervals are in the table. The opponent is the best arm of the baselines for each "
        f"target, chosen on the other seeds{alone}. “Never” refers to the steps that were run; “only it”: the "
        "opponent does not arrive."
    )


def opponents(part: Part) -> str:
    """Names the opponents of a panel."""
    return f"baselines of both grids, {len(part['seeds'])} seeds" if part["label"] else "baselines of this grid"


def _strategy(
    panel: Any, lookup: Lookup, part: Part, task: str, axis: str, strategy: str, look: Look, band: bool
) -> None:
    found = curves(part, task, axis, strategy)
    main = next((arm for arm, _ in found if arm[1] == lookup.reference), found[0][0] if found else None)
    for arm, row in found:
        points = [
            (share, *(_inside(row[name][i]) for name in ("median", "low", "high")))
            for i, share in enumerate(part["shares"]) if row["n"][i]
        ]  # fmt: skip
        if not points:
            continue
        shares, medians, lows, highs = zip(*points, strict=True)
        line = {"color": look.light, "linestyle": look.linestyle}
        if arm == main:
            panel.plot(shares, medians, linewidth=1.9, marker=look.marker, markersize=4.5, label=strategy, **line)
            if band:
                panel.fill_between(shares, lows, highs, color=look.light, alpha=0.15, linewidth=0)
        else:
            panel.plot(shares, medians, linewidth=0.7, alpha=0.7, **line)


def _inside(value: float | None) -> float:
    return min(max(math.inf if value is None else value, _FLOOR), _CEILING)


def _dress(panel: Any, title: str) -> None:
    panel.axhline(1, color=MUTED, linewidth=1)
    panel.set(xscale="log", yscale="log", xlim=(0.55, 0.009), ylim=(_FLOOR * 0.93, _CEILING * 1.07))
    panel.set_xticks([0.5, 0.25, 0.1, 0.05, 0.025, 0.01], ["50 %", "25 %", "10 %", "5 %", "2.5 %", "1 %"])
    panel.set_yticks([0.1, 0.25, 0.5, 1, 2, 4, 8], ["never, ≤ 0.1", "¼", "½", "1×", "2", "4", "only it, ≥ 8"])
    panel.minorticks_off()
    panel.set_title(title, loc="left")


def figures(lookup: Lookup) -> Mapping[str, str]:
    """Name of each figure → its axis."""
    return {f"envelope_{_file(axis)}": axis for axis in axes_of_figures(lookup)}


def _file(axis: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in axis)
