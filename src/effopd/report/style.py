"""Style of figures and pages: color, shade and dash of every strategy, axes, title and note."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd.common.optional import require

INK, MUTED, FAINT = "#22262e", "#6b7280", "#c9ced6"
#: Ground of the pages: light, dark.
GROUNDS = ("#ffffff", "#15181e")


@dataclass(frozen=True)
class Look:
    """Appearance of one run or strategy in every figure.

    Attributes:
        light: color on a light ground.
        dark: color on a dark ground.
        dash: `stroke-dasharray` of an SVG line, in pixels; "" draws a solid line.
        marker: matplotlib's name of a marker.
    """

    light: str
    dark: str
    dash: str = ""
    marker: str = "o"

    @property
    def linestyle(self) -> Any:
        """The dash as matplotlib's line style."""
        return (0, tuple(map(float, self.dash.split()))) if self.dash else "-"


#: Strategy → color on a light and on a dark ground. Same colors on every page and in every figure.
STRATEGY_COLORS: dict[str, tuple[str, str]] = {
    "plain": ("#4c566a", "#aeb8c9"),
    "effopd": ("#d1495b", "#f2788a"),
    "line_search": ("#2a72b0", "#5fb0ea"),
    "newton_search": ("#7a2fb0", "#bd86f2"),
    "rl": ("#0e8a62", "#35c795"),
    "sft": ("#b88114", "#e8bd5c"),
    "topd": ("#b0147f", "#f25fc0"),
    "popd": ("#335214", "#9cc26a"),
    "exopd": ("#7d4d36", "#c98e6c"),
    "alpha_opd": ("#3fa01a", "#74e04a"),
    "relex": ("#1c1f8c", "#cdc8ff"),
    "fixed": ("#0f9fb5", "#45dbe8"),
    "noop": ("#7d8a0f", "#d3e34a"),
    "random_direction": ("#c2709f", "#f4b6d6"),
}
#: Other names of a strategy, in lower case.
_ALIASES = {"opd": "plain", "plain opd": "plain", "none": "plain", "vanilla": "plain", "grpo": "rl", "dapo": "rl"}
#: Share of ink mixed into the color, and dash, of the first, second, … run of one strategy.
_SHADES = ((0.0, ""), (0.5, "7 3"), (0.25, "2 3"), (0.7, "9 3 2 3"), (0.1, "14 4"), (0.4, "4 4"), (0.6, "1 4"))
#: Ink of the shades on a light and on a dark ground.
_INKS = ("#07080b", "#ffffff")
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


def strategy_of(name: str) -> str | None:
    """Registered strategy of a label: the same name, an alias, or a name with a suffix.

    Example:
        >>> strategy_of("line_search-32"), strategy_of("plain OPD"), strategy_of("my_method")
        ('line_search', 'plain', None)
    """
    lower = name.strip().lower()
    known = [*STRATEGY_COLORS, *_ALIASES]
    fits = [key for key in known if lower == key or re.match(re.escape(key) + r"[-#/:. (]", lower)]
    longest = max(fits, key=len, default=None)
    return None if longest is None else _ALIASES.get(longest, longest)


def looks(strategies: Mapping[str, str]) -> dict[str, Look]:
    """Look of every label: its strategy's color; the second, third, … label of one strategy differ
    in shade and dash.

    Strategies without a registered color take registered colors that are not in use here.

    Args:
        strategies: label → name of its strategy.
    """
    names = {label: strategy_of(name) or name for label, name in strategies.items()}
    used = set(names.values()) & set(STRATEGY_COLORS)
    free = [colors for key, colors in STRATEGY_COLORS.items() if key not in used] or list(STRATEGY_COLORS.values())
    others = [name for name in dict.fromkeys(names.values()) if name not in STRATEGY_COLORS]
    colors = STRATEGY_COLORS | {name: free[i % len(free)] for i, name in enumerate(others)}
    rounds = {name: i // len(free) for i, name in enumerate(others)}
    count: Counter[tuple[str, str]] = Counter()
    found = {}
    for position, (label, name) in enumerate(names.items()):
        pair = colors[name]
        share, dash = _SHADES[(count[pair] + rounds.get(name, 0)) % len(_SHADES)]
        light, dark = (_mixed(color, ink, share) for color, ink in zip(pair, _INKS, strict=True))
        found[label] = Look(light, dark, dash, MARKERS[position % len(MARKERS)])
        count[pair] += 1
    return found


def _mixed(color: str, ink: str, share: float) -> str:
    """The color with a share of ink, mixed in sRGB."""
    parts = [(int(color[i : i + 2], 16), int(ink[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in parts)


def group_colors(groups: Iterable[str]) -> dict[str, str]:
    """Color of every group on a light ground, see `looks`."""
    return {name: look.light for name, look in looks({name: name for name in groups}).items()}


def quiet_style():
    """Context with the package's figure style: no box, faint grid, small print."""
    return require("matplotlib").rc_context(_STYLE)


def legend_beside(figure, axes: Iterable[Any]) -> None:
    """One legend of all axes in a column of its own on the right; the figure widens for it."""
    known = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if known:
        figure.set_figwidth(figure.get_figwidth() + 0.8 + 0.066 * max(map(len, known)))  # inches, a letter of 8 pt
        figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False, fontsize=8)


def _mark_if_empty(axis) -> None:
    """Label a logarithmic panel without positive data, which matplotlib cannot draw."""
    empty = [
        name
        for name in ("x", "y")
        if getattr(axis, f"get_{name}scale")() == "log" and not math.isfinite(getattr(axis.dataLim, f"minpos{name}"))
    ]
    for name in empty:
        getattr(axis, f"set_{name}scale")("linear")
        getattr(axis, f"set_{name}ticks")([])
    if empty:
        axis.text(0.5, 0.5, "no finished runs", transform=axis.transAxes, ha="center", va="center", color=MUTED)


def save(figure, path: Path, title: str, note: str = "") -> Path:
    """Add a title (top left) and a note (bottom) to the figure, and save it to `path`."""
    for axis in figure.axes:
        _mark_if_empty(axis)
    width = int(figure.get_figwidth() * 72 / (7.5 * 0.56))
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 0.6))), x=0.01, ha="left")
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, width)), fontsize=7.5, color=MUTED, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
