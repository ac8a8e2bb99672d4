"""Figure style: axes, colors of groups, title and note."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effopd.common.optional import require

INK, MUTED, FAINT = "#22262e", "#6b7280", "#c9ced6"
#: The first six: Okabe and Ito's colors, distinguishable with common forms of color blindness.
_PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#22262e", "#7f6a1f")
_KNOWN = {
    "opd": "#d55e00",
    "effopd": "#009e73",
    "rl": "#0072b2",
    "grpo": "#0072b2",
    "dapo": "#56b4e9",
    "sft": "#cc79a7",
}
#: One marker per group.
MARKERS = ("o", "s", "D", "v", "P", "X", "<", ">")
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "font.size": 8.5,
    "grid.alpha": 0.45,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


def group_colors(groups: Iterable[str]) -> dict[str, str]:
    """One color per group: fixed colors for opd, rl, sft, …, palette colors for the rest.

    Up to eight groups have distinct colors.
    """
    names, colors = list(groups), dict[str, str]()
    for name in names:
        known = _KNOWN.get(name.lower())
        if known is not None and known not in colors.values():
            colors[name] = known
    free = [color for color in _PALETTE if color not in colors.values()] or list(_PALETTE)
    for i, name in enumerate(name for name in names if name not in colors):
        colors[name] = free[i % len(free)]
    return {name: colors[name] for name in names}


def quiet_style():
    """Context with the package's figure style: no box, faint grid, small print."""
    return require("matplotlib").rc_context(_STYLE)


def save(figure, path: Path, title: str, note: str = "") -> Path:
    """Add a title (top left) and a note (bottom) to the figure, and save it to `path`."""
    width = int(figure.get_figwidth() * 72 / (7.5 * 0.56))
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 0.6))), x=0.01, ha="left")
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, width)), fontsize=7.5, color=MUTED, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
