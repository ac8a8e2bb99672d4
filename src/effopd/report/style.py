"""How every figure looks: quiet axes, one colour a group, a title and a note."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effopd.optional import require

INK, MUTED, FAINT = "#22262e", "#6b7280", "#c9ced6"
_KNOWN = {
    "opd": "#d1495b",
    "effopd": "#a4243b",
    "rl": "#2e6f9e",
    "grpo": "#2e6f9e",
    "dapo": "#5a4fa2",
    "sft": "#5f8f3e",
}
_PALETTE = ("#d1495b", "#2e6f9e", "#5f8f3e", "#d98b2b", "#5a4fa2", "#3a9188", "#8c5a3c", "#b2558e")
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
    """One colour a group: the usual ones for opd, rl, sft, …; the palette for the rest. The same in every figure."""
    names = list(groups)
    colors = {name: _KNOWN[name.lower()] for name in names if name.lower() in _KNOWN}
    free = [color for color in _PALETTE if color not in colors.values()] or list(_PALETTE)
    for i, name in enumerate(name for name in names if name not in colors):
        colors[name] = free[i % len(free)]
    return colors


def quiet_style():
    """A context in which figures have no box, a faint grid and small print; the caller's own style is left alone."""
    return require("matplotlib").rc_context(_STYLE)


def save(figure, path: Path, title: str, note: str = "") -> Path:
    """Title at the top left, a note on what is shown below, and the file."""
    width = int(figure.get_figwidth() * 72 / (7.5 * 0.56))
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 0.6))), x=0.01, ha="left")
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, width)), fontsize=7.5, color=MUTED, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
