"""Charts of update directions: similarity to the final ones, path of u1, agreement of runs."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from effopd.analysis import table_queries
from effopd.report.charts import NEUTRAL, Axis, Chart, Panel, Rule, Series
from effopd.report.compare_lookup import Table
from effopd.report.direction_figures import over_pairs, pictured
from effopd.report.dynamics_charts import strips
from effopd.report.dynamics_data import Data, complete_steps, matrix_rank, short_matrix
from effopd.report.style import Look

#: Looks of increasing k, dark to light on a light ground and the reverse on a dark one.
_BY_K = (
    Look("#3b1357", "#e9dc4e"), Look("#32508a", "#8fd06a"), Look("#1f7d8c", "#45b594"),
    Look("#3f9e62", "#5a9fc9"), Look("#8a8f1c", "#a98ae0"),
)  # fmt: skip


def subspaces(data: Data, side: str) -> Chart | None:
    """Similarity of step t and the final step for a few k: cosine, projector overlap, angle."""
    readings = {
        f"{side}_cosine": "|cos| of the k-th direction",
        f"{side}_overlap": "overlap of the leading-k subspaces",
        f"{side}_angle_max": "largest angle, degrees",
    }
    if not data.moving or "subspaces" not in data.summary["settings"]["metrics"]:
        return None
    rows = data.table("subspaces", [("reference", "==", "final"), ("metric", "in", list(readings))])
    rows = rows[rows["module"].isin(table_queries.AVERAGED)].dropna(subset=["value"])
    if rows.empty:
        return None
    largest = int(rows["k"].max())
    panels = []
    for metric, name in readings.items():
        for group, runs in data.moving.items():
            of_group = rows[rows["run"].isin(runs) & (rows["metric"] == metric)]
            lines = [_by_k(data, group, of_group[of_group["k"] == k], k, i) for i, k in enumerate(_shown(largest))]
            early = data.runs[runs[0]]["trajectory"]["steps"][-1] * 0.1
            rules = [Rule(early, "10 %", vertical=True)]
            if metric.endswith("overlap"):
                chance = largest * data.runs[runs[0]]["trajectory"]["overlap_chance"][side]
                rules.append(Rule(chance, f"chance, k = {largest}"))
            limits = (0.0, 92.0) if "angle" in metric else (0.0, 1.02)
            panels.append(Panel(f"{data.label(group)}: {name}", Axis("step"), Axis(name, limits=limits), lines, rules))
    note = (
        f"{side.capitalize()} singular directions of the update: similarity to the final ones. Means over attention "
        "and MLP matrices with 95 % intervals, over seeds if there are several. The last step is compared with itself."
    )
    return Chart(f"subspaces-{side}", note, panels, note, columns=min(3, len(data.moving)))


def _shown(largest: int) -> list[int]:
    """At most five values of k: 1, 2, 5, 10 and the largest."""
    return sorted({k for k in (1, 2, 5, 10) if k < largest} | {largest})


def _by_k(data: Data, group: str, rows: pd.DataFrame, k: int, place: int) -> Series:
    kept = complete_steps(rows) if len(rows) else rows
    band = data.band(group, kept)
    steps = [int(step) for step in band.index]
    return Series(f"k = {k}", steps, list(band["mean"]), _BY_K[place], list(band["low"]), list(band["high"]))


def first_last(data: Data) -> dict[str, Table]:
    """Group → table of |cos(u1(first), u1(last))|, layer by matrix, averaged over seeds."""
    if not data.moving or "subspaces" not in data.summary["settings"]["metrics"]:
        return {}
    rows = data.table("subspaces", [("reference", "==", "first"), ("metric", "==", "left_cosine")])
    rows = rows[rows["module"].isin(table_queries.AVERAGED) & (rows["layer"] >= 0)]
    rows = rows.assign(matrix=rows["matrix"].astype(str).map(short_matrix))
    matrices = sorted(rows["matrix"].unique(), key=matrix_rank)
    tables = {}
    for group, runs in data.moving.items():
        grid = rows[rows["run"].isin(runs)].groupby(["layer", "matrix"], observed=True)["value"].mean().unstack()
        lines = [[str(layer), *(_heat(grid, layer, matrix) for matrix in matrices)] for layer in grid.index]
        if lines:
            tables[data.label(group)] = Table(["layer", *matrices], lines)
    return tables


def _heat(grid: pd.DataFrame, layer: int, matrix: str) -> str:
    """A cell whose ground grows darker with the value."""
    value = grid.loc[layer].get(matrix)
    if value is None or pd.isna(value):
        return "–"
    return Markup('<td class="heat" style="background:rgb(42 114 176 / {:.2f})">{:.2f}</td>').format(
        0.75 * value, value
    )


def u1_path(data: Data) -> Chart | None:
    """Path of u1 in its PCA plane for a few matrices."""
    if not data.moving or "directions" not in data.summary["settings"]["metrics"]:
        return None
    rows = data.table("directions")
    panels = []
    for layer, module, matrix in pictured(rows, "pc"):
        lines = []
        for group, runs in data.moving.items():
            here = rows["layer"].eq(layer) & rows["module"].eq(module) & rows["matrix"].eq(matrix)
            of_run = rows[here & rows["run"].eq(runs[0]) & rows["metric"].isin(("pc1", "pc2"))]
            xy = of_run.pivot(index="step", columns="metric", values="value").astype(float)
            if len(xy):
                tips = [f"step {step}" for step in xy.index]
                marks = [len(xy) - 1]
                lines.append(Series(runs[0], xy["pc1"].to_list(), xy["pc2"].to_list(), data.looks[group], tips=tips))
                end = Look(data.looks[group].light, data.looks[group].dark, "", "D")
                last = xy.iloc[marks]
                lines.append(Series(runs[0], last["pc1"].to_list(), last["pc2"].to_list(), end, tips=tips[-1:]))
        panels.append(Panel(f"layer {layer}, {matrix}", Axis("component 1"), Axis("component 2"), lines))
    note = (
        "Path of the leading left direction u1 in its own principal-component plane. Diamond: last snapshot. Every "
        "run has its own plane, so that only the shapes of two runs can be compared."
    )
    return Chart("u1-path", note, panels, note)


def explained(data: Data) -> Chart | None:
    """Variance of the path of u1 in a plane, and of random walks of equal step lengths."""
    if not data.has("u1_evr"):
        return None
    x, series = strips(data, data.last, "u1_evr", ("u1_evr_null_mean", "random walk"))
    note = (
        "Share of the variance of u1's path in a plane, for every matrix, and of random walks of equal step lengths."
    )
    return Chart("u1-variance", note, [Panel("", x, Axis("variance explained"), series)], note)


def agreement(data: Data) -> Chart | None:
    """Overlap of the final leading subspaces of different runs, with chance level."""
    if len(data.runs) < 2 or "subspaces" not in data.summary["settings"]["metrics"]:
        return None
    sizes = {"left_overlap": "rows", "right_overlap": "columns"}
    rows = data.table("subspaces", [("reference", "in", list(data.runs)), ("metric", "in", list(sizes))])
    rows = rows[rows["module"].isin(table_queries.AVERAGED)].dropna(subset=["value"])
    if rows.empty:
        return None
    group = {run: values["group"] for run, values in data.runs.items()}
    kinds = [f"{group[str(a)]} – {group[str(b)]}" for a, b in zip(rows["run"], rows["reference"], strict=True)]
    rows = rows.assign(kind=kinds)
    panels = []
    for metric, size in sizes.items():
        lines = []
        for kind, of_kind in rows[rows["metric"] == metric].groupby("kind", sort=False):
            one, other = str(kind).split(" – ")
            own = data.looks[one]
            look = own if one == other else Look(own.light, own.dark, "7 4", data.looks[other].marker)
            line, low, high = over_pairs(of_kind)
            label = f"{kind}{' (seeds)' if one == other else ''}"
            lines.append(Series(label, [int(k) for k in line.index], line.to_list(), look, low, high))
        chance = float((1 / data.last.loc[data.last["metric"] == size, "value"]).mean())
        ks = [int(k) for k in sorted(rows["k"].unique())]
        lines.append(Series("chance", ks, [k * chance for k in ks], NEUTRAL, points=False))
        title = f"{metric.split('_')[0]} singular directions"
        panels.append(Panel(title, Axis("k"), Axis("overlap of the leading-k subspaces"), lines))
    note = (
        "Agreement of different runs: overlap of their final leading subspaces. Means over attention and MLP matrices "
        "with 95 % intervals over matrices; pairs of seeds are averaged first."
    )
    return Chart("agreement", note, panels, note)
