"""HTML page of a folder of interventions: a summary in words, a chart and a table of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table as Printed

from effopd.report.charts import NEUTRAL, Axis, Chart, Panel, Rule, Series
from effopd.report.compare_lookup import Table
from effopd.report.intervention_panels import groups_of, summarized
from effopd.report.intervention_table import intervention_table
from effopd.report.linearity_table import linearity_table
from effopd.report.pages import write_html
from effopd.report.style import Look, looks

PAGE = "report.html"
_METRICS = {"accuracy": "accuracy", "kl": "reverse KL to the teacher, nats per token"}


@dataclass(frozen=True)
class _Kind:
    """Columns that an intervention is drawn by.

    Attributes:
        title: what is edited.
        x: column of the x axis; text is drawn as categories.
        label: label of the x axis.
        panel: column with one panel per value; "": one panel.
        line: column with one line per value besides the group; "": one line.
        scale, y_scale: scales of the axes.
    """

    title: str
    x: str
    label: str
    panel: str = ""
    line: str = ""
    scale: str = "linear"
    y_scale: str = "linear"


_KINDS = {
    "alpha": _Kind("Along the update: W0 + αΔW", "alpha", "α"),
    "trajectory": _Kind("Along training: W_t", "step", "optimizer step t"),
    "embedding": _Kind("Embedding replacement", "replaced", "part taken from the base"),
    "window": _Kind("Windows of trained layers in the base", "center", "center layer", panel="module"),
    "swap": _Kind("Modules and layers swapped", "unit", "part", panel="side"),
    "rank": _Kind("Low-rank updates", "percent", "components kept, %", panel="end", scale="log"),
    "norm_scaling": _Kind("Early updates scaled toward the final norm", "beta", "β", panel="group", line="step"),
    "random": _Kind("Random directions of the norm of the update", "run", "run"),
    "linearity": _Kind(
        "KL along W_t + sΔ", "scale", "scale s", panel="anchor", line="step", scale="symlog", y_scale="log"
    ),
}
#: Lines of another column than the group, dark to light.
_SHADES = ("#3b1357", "#32508a", "#1f7d8c", "#3f9e62", "#8a8f1c")
_SHADES_DARK = ("#e9dc4e", "#8fd06a", "#45b594", "#5a9fc9", "#a98ae0")


def write_intervention_page(
    frame: pd.DataFrame, coordinates: Mapping[str, Sequence[str]], out: Path, rows: Sequence[Path]
) -> Path:
    """Write the page of a table of results to `out`.

    Args:
        frame: the results of a folder (see `effopd.interventions.results`).
        coordinates: intervention → columns that identify its points.
        rows: files with the results, which the page links.
    """
    sections = []
    for name, columns in coordinates.items():
        printed = linearity_table(frame) if name == "linearity" else intervention_table(frame, name, columns)
        kind = _KINDS.get(name, _Kind(name, columns[0], columns[0]))
        sections.append((kind.title, str(printed.title), _chart(frame, name, kind), _cells(printed)))
    runs = ", ".join(run for run in dict.fromkeys(frame["run"]) if run != "base")
    return write_html(
        out,
        "interventions.html.jinja",
        f"Interventions: {runs}",
        sentences(frame, coordinates),
        rows,
        sections=sections,
    )


def _cells(printed: Printed) -> Table:
    """The cells of a table of the terminal."""
    columns = [[str(cell) for cell in column.cells] for column in printed.columns]
    return Table([str(column.header) for column in printed.columns], list(zip(*columns, strict=True)))


def _chart(frame: pd.DataFrame, name: str, kind: _Kind) -> Chart:
    """One line per group with its interval: metrics (rows) by the values of the panel's column."""
    rows = frame[frame["intervention"] == name]
    styles = looks({group: group for group in groups_of(rows)})
    metrics = [metric for metric in _METRICS if metric in rows and rows[metric].notna().any()]
    values: list[Any] = list(dict.fromkeys(rows[kind.panel])) if kind.panel else [None]
    names = [str(value) for value in dict.fromkeys(rows[kind.x])]
    numeric = pd.api.types.is_numeric_dtype(rows[kind.x])
    ticks = None if numeric else [(float(i), text) for i, text in enumerate(names)]
    if not numeric:
        rows = rows.assign(
            **{kind.x: [float(names.index(str(value))) for value in rows[kind.x]], "name": rows[kind.x]}
        )
    panels = []
    for metric in metrics:
        for value in values:
            here = rows if value is None else rows[rows[kind.panel] == value]
            lines = [line for group in groups_of(here) for line in _lines(here, group, kind, metric, styles, numeric)]
            limits = None if numeric else (-0.5, len(names) - 0.5)
            x = Axis(kind.label, kind.scale, ticks=ticks, limits=limits)
            title = "" if value is None else f"{kind.panel}: {value}"
            panels.append(
                Panel(title, x, Axis(_METRICS[metric], kind.y_scale), lines, list(_rules(frame, metric, here, styles)))
            )
    seeds = rows["run"].nunique() > rows["group"].nunique()
    bands = "Intervals: range over seeds." if seeds else "Intervals: 95 % over prompts."
    note = f"{kind.title}. {bands} Dotted: the base and the trained models."
    return Chart(name, note, panels, note, columns=2 if len(values) < 3 else 3)


def _lines(
    rows: pd.DataFrame, group: str, kind: _Kind, metric: str, styles: Mapping[str, Look], numeric: bool
) -> Iterator[Series]:
    of_group = rows[rows["group"] == group]
    parts = [(group, of_group, styles[group])]
    if kind.line:
        marker = styles[group].marker
        parts = [
            (
                f"{group}, {kind.line} {value:g}",
                part,
                Look(_SHADES[i % 5], _SHADES_DARK[i % 5], styles[group].dash, marker),
            )
            for i, (value, part) in enumerate(_spread(list(of_group.groupby(kind.line))))
        ] or parts
    for label, part, look in parts:
        line = summarized(part, kind.x, metric)
        norms = part.groupby(kind.x)["update_norm"].mean() if "update_norm" in part else {}
        tips = [f"‖W − W0‖ {norms[x]:.4g}" if x in norms else "" for x in line.x]
        yield Series(
            label, line.x.to_list(), line["mean"].to_list(), look, line.low.to_list(), line.high.to_list(),
            bars=not numeric, line=numeric, tips=tips,
        )  # fmt: skip
        if metric == "kl" and "kl_predicted" in part:
            predicted = summarized(part, kind.x, "kl_predicted") if "kl_predicted_low" in part else None
            values = (
                part.groupby(kind.x)["kl_predicted"].mean() if predicted is None else predicted.set_index("x")["mean"]
            )
            dashed = Look(look.light, look.dark, "5 3", look.marker)
            yield Series(
                label, [float(x) for x in values.index], values.to_list(), dashed, points=False, note="predicted"
            )


def _spread(parts: list[Any], most: int = 5) -> list[Any]:
    """At most `most` parts, evenly spread, with the first and the last."""
    if len(parts) <= most:
        return parts
    return [parts[round(i * (len(parts) - 1) / (most - 1))] for i in range(most)]


def _rules(frame: pd.DataFrame, metric: str, here: pd.DataFrame, styles: Mapping[str, Look]) -> Iterator[Rule]:
    """Reference lines: the base, and the trained model of every group in the panel."""
    rows = frame[frame["intervention"] == "reference"]
    if metric not in rows:
        return
    for group, seeds in rows.groupby("group", sort=False):
        if group == "base" or group in set(here["group"]):
            mean = float(seeds[metric].astype(float).mean())
            yield Rule(mean, "base" if group == "base" else f"{group}, trained", look=styles.get(str(group), NEUTRAL))


def sentences(frame: pd.DataFrame, coordinates: Mapping[str, Sequence[str]]) -> list[str]:
    """Accuracy of the base and the trained models; best point of every intervention and run."""
    found = []
    reference = frame[frame["intervention"] == "reference"]
    if len(reference) and "accuracy" in reference:
        parts = [f"{row['run']} {_interval(row)}" for _, row in reference.iterrows()]
        found.append(f"Accuracy with its 95 % interval over {int(reference['n'].max())} prompts: {'; '.join(parts)}.")
    for name, columns in coordinates.items():
        rows = frame[frame["intervention"] == name]
        if "accuracy" not in rows or rows["accuracy"].isna().all():
            continue
        parts = []
        for run, points in rows.groupby("run", sort=False):
            best = points.loc[points["accuracy"].astype(float).idxmax()]
            place = ", ".join(f"{column} {_text(best[column])}" for column in columns if not pd.isna(best[column]))
            parts.append(f"{run} {_interval(best)} at {place}" if len(points) > 1 else f"{run} {_interval(best)}")
        word = "highest accuracy" if len(rows) > rows["run"].nunique() else "accuracy"
        found.append(f"{name}, {word}: {'; '.join(parts)}.")
    if "gain_share" in frame and len(
        shares := frame[frame["intervention"] == "linearity"].dropna(subset=["gain_share"])
    ):
        by_group = shares.groupby("group", sort=False)["gain_share"].median()
        parts = [f"{value:.0%} for {group}" for group, value in by_group.items()]
        found.append(
            "linearity: the predicted best scale reaches this share of the gain of the true one, median over steps: "
            f"{'; '.join(parts)}."
        )
    return found or [f"{', '.join(coordinates)}: {len(frame)} points."]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(row: pd.Series) -> str:
    if pd.isna(row["accuracy"]):
        return "–"
    return f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
