"""Interactive charts of the pages: data of panels and lines, drawn by `templates/charts.js`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from effopd.report.style import Look

#: Look of a reference that belongs to no strategy, such as a chance level.
NEUTRAL = Look("#868e9c", "#7d8695")
#: Significant digits of the numbers in a page.
_DIGITS = 6


@dataclass(frozen=True)
class Axis:
    """An axis of a panel.

    Attributes:
        label: quantity with its unit.
        scale: `linear`, `log` or `symlog` (linear between −1 and 1).
        ticks: (value, text) of fixed ticks. `None`: chosen by the script.
        limits: lowest and highest value shown. `None`: from the data.
        reverse: whether values grow to the left or downwards.
        zero: whether the axis starts at 0.
    """

    label: str = ""
    scale: str = "linear"
    ticks: Sequence[tuple[float, str]] | None = None
    limits: tuple[float, float] | None = None
    reverse: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Series:
    """A line or a cloud of points.

    Attributes:
        label: entry of the legend; series of one label are shown and hidden together.
        x, y: coordinates; points that are not finite are left out.
        look: color, dash and marker.
        low, high: ends of an interval per point. `None`: no interval.
        bars: whether intervals are bars instead of a band.
        line, points: whether to draw a line through the points, and the points.
        width: width of the line in pixels.
        marks: indices of the points marked with a triangle.
        tips: text per point, shown first in the tooltip.
        note: text added to the label in the tooltip.
    """

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    look: Look = NEUTRAL
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    bars: bool = False
    line: bool = True
    points: bool = True
    width: float = 1.8
    marks: Sequence[int] = ()
    tips: Sequence[str] | None = None
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """A straight reference line across a panel: at a value of y, or of x if `vertical`."""

    at: float
    label: str = ""
    vertical: bool = False
    look: Look = NEUTRAL


@dataclass(frozen=True)
class Panel:
    """One coordinate system."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Chart:
    """A figure of a page: panels with a common legend.

    Attributes:
        name: identifier, unique in the page.
        alt: description for readers who do not see the figure.
        panels: coordinate systems in reading order; those without a point are left out.
        note: sentence below the figure.
        columns: panels side by side on a wide screen.
        legend: whether to show a legend.
        compact: whether panels are small, and two fit side by side on a narrow screen.
        rows: number of rows of a panel that lists names along y; 0: the height follows the width.
    """

    name: str
    alt: str
    panels: Sequence[Panel]
    note: str = ""
    columns: int = 2
    legend: bool = True
    compact: bool = False
    rows: int = 0
    #: Panels with a point.
    drawn: Sequence[Panel] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", [panel for panel in self.panels if any(map(_points, panel.series))])


def existing(charts: Iterable[Chart | None]) -> list[Chart]:
    """The charts that have at least one point."""
    return [chart for chart in charts if chart is not None and chart.drawn]


def html(chart: Chart | None) -> Markup:
    """The element of a chart, with its data; "" for a chart without points."""
    if chart is None or not chart.drawn:
        return Markup("")
    note = Markup('<p class="note">{}</p>').format(chart.note) if chart.note else ""
    data = json.dumps(_content(chart), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(
        '<figure class="chart{}" id="{}" data-alt="{}" style="--columns:{}">{}'
        '<script type="application/json">{}</script></figure>'
    ).format(
        " compact" if chart.compact else "",
        chart.name,
        chart.alt,
        chart.columns,
        note,
        Markup(data.replace("<", "\\u003c")),
    )


def _content(chart: Chart) -> dict[str, Any]:
    panels = [
        {
            "title": panel.title,
            "x": _axis(panel.x),
            "y": _axis(panel.y),
            "series": [_series(series) for series in panel.series if _points(series)],
            "rules": [
                {"at": rule.at, "label": rule.label, "vertical": rule.vertical, "look": _look(rule.look)}
                for rule in panel.rules
                if math.isfinite(rule.at)
            ],
        }
        for panel in chart.drawn
    ]
    return {"legend": chart.legend, "rows": chart.rows, "panels": panels}


def _axis(axis: Axis) -> dict[str, Any]:
    shown = {"label": axis.label, "scale": axis.scale, "ticks": axis.ticks, "limits": axis.limits}
    flags = {"reverse": axis.reverse, "zero": axis.zero}
    return {name: value for name, value in (shown | flags).items() if value}


def _points(series: Series) -> list[int]:
    """Indices of the points with finite coordinates."""
    both = enumerate(zip(series.x, series.y, strict=True))
    return [i for i, (x, y) in both if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]


def _series(series: Series) -> dict[str, Any]:
    kept = _points(series)
    content: dict[str, Any] = {
        "label": series.label,
        "look": _look(series.look),
        "x": [_short(series.x[i]) for i in kept],
        "y": [_short(series.y[i]) for i in kept],
        "width": series.width,
    }
    if series.low is not None and series.high is not None:
        content |= {"low": [_short(series.low[i]) for i in kept], "high": [_short(series.high[i]) for i in kept]}
    if series.tips is not None:
        content["tips"] = [series.tips[i] for i in kept]
    if series.marks:
        content["marks"] = [place for place, i in enumerate(kept) if i in set(series.marks)]
    flags = {"bars": series.bars, "line": series.line, "points": series.points}
    return content | flags | ({"note": series.note} if series.note else {})


def _look(look: Look) -> dict[str, str]:
    return {"light": look.light, "dark": look.dark, "dash": look.dash, "marker": look.marker}


def _short(value: float | None) -> float | None:
    """The number with a few significant digits; `None` if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
