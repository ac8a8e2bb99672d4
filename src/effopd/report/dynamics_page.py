"""HTML page of an analysis, from its tables alone: a summary in words, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.report import direction_charts, dynamics_charts
from effopd.report.charts import existing
from effopd.report.dynamics_data import Data
from effopd.report.dynamics_tables import estimate, legend, metrics_table, modules_table
from effopd.report.pages import write_html

PAGE = "report.html"
#: Files of an analysis with its values.
_FILES = ("summary.json", "matrices.csv", "subspaces.csv", "directions.csv", "embeddings.csv")


def write_analysis_page(folder: Path, out: Path) -> Path:
    """Write the page of the analysis in `folder` to `out`.

    Raises:
        CheckpointError: `folder` holds no finished analysis.
    """
    data = Data(folder)
    summary = data.summary
    parts = summary["parts"]
    runs = ", ".join(data.label(group) for group in data.groups)
    sections = {
        "Norms": [dynamics_charts.norms(data), dynamics_charts.layers(data)],
        "Spectrum": [dynamics_charts.spectrum(data)],
        "Subspaces over training": [
            *(direction_charts.subspaces(data, side) for side in ("left", "right")),
            direction_charts.agreement(data),
        ],
        "Directions": [direction_charts.u1_path(data), direction_charts.explained(data)],
        "Embeddings": [dynamics_charts.embeddings(data)],
        "Changed entries and rotation": [dynamics_charts.entries(data), dynamics_charts.rotation(data)],
    }
    return write_html(
        out,
        "analysis.html.jinja",
        f"Weight updates: {runs}",
        sentences(summary),
        [folder / name for name in _FILES],
        about=f"Base: {summary['settings']['base']}. {parts['parts']} tensors, {parts['averaged']} attention and MLP "
        f"matrices in the means; k = {data.k} leading directions.",
        metrics=metrics_table(summary),
        modules=modules_table(summary),
        legend=legend(summary),
        notes=summary["notes"],
        first_last=direction_charts.first_last(data),
        sections={name: existing(charts) for name, charts in sections.items()},
    )


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was measured, per group: norm, spectrum, early directions, path of u1, entries."""
    found = []
    k = summary["settings"]["k"]
    for name, group in summary["groups"].items():
        found.append(f"**{name}**: {'; '.join(_facts(group, k))}.")
    return [*found, *legend(summary)[:1]]


def _facts(group: Mapping[str, Any], k: int) -> list[str]:
    metrics = group["metrics"]

    def has(metric: str) -> bool:
        return (metrics.get(metric) or {}).get("mean") is not None

    facts = [f"update norm {estimate(group['update_norm'], '.4g')}"]
    if has("relative_norm"):
        facts[0] += f", per matrix {estimate(metrics['relative_norm'], '.2%')} of the matrix"
    if has("spectral_to_frobenius"):
        facts.append(f"the largest singular value is {estimate(metrics['spectral_to_frobenius'], '.1%')} of the norm")
    if has("effective_rank"):
        floor = metrics.get("effective_rank_noise_floor")
        noise = f", of pure rounding noise {estimate(floor, '.1f')}" if has("effective_rank_noise_floor") else ""
        facts.append(f"effective rank {estimate(metrics['effective_rank'], '.1f')}{noise}")
    if has("early_left_overlap_1"):
        facts.append(
            f"early in training u1 overlaps the final u1 by {estimate(metrics['early_left_overlap_1'], '.1%')}"
        )
        if has(f"early_left_overlap_{k}"):
            facts[-1] += f", the top-{k} subspaces by {estimate(metrics[f'early_left_overlap_{k}'], '.1%')}"
    if has("u1_evr"):
        walk = f", a random walk {estimate(metrics['u1_evr_null_mean'], '.1%')}" if has("u1_evr_null_mean") else ""
        facts.append(f"the path of u1 has {estimate(metrics['u1_evr'], '.1%')} of its variance in a plane{walk}")
    shares = {module: values["share"]["mean"] or 0.0 for module, values in group["modules"].items()}
    if shares:
        largest = max(shares, key=lambda module: shares[module])
        facts.append(f"{largest} holds {estimate(group['modules'][largest]['share'], '.1%')} of the squared norm")
    if has("bf16_unchanged_share"):
        facts.append(f"{estimate(metrics['bf16_unchanged_share'], '.1%')} of the entries are unchanged in bf16")
    return facts
