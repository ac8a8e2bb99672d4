"""Tables of an analysis with their intervals, and their legend in words, from its summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effopd.report.compare_lookup import Table
from effopd.report.dynamics_data import MODULE_COLORS

#: Printed metric → (label, format). "%" prints a share as a percentage.
_ROWS = {
    "frobenius_norm": ("update norm per matrix", ".3g"),
    "relative_norm": ("… relative to the matrix", ".2%"),
    "spectral_norm": ("spectral norm s1", ".3g"),
    "spectral_to_frobenius": ("s1 / norm", ".1%"),
    "effective_rank": ("effective rank", ".1f"),
    "effective_rank_noise_floor": ("… of pure rounding noise", ".1f"),
    "top1pct_norm_ratio": ("norm in the top 1 % of directions", ".1%"),
    "early_left_overlap_1": ("early: u1, overlap with final", ".1%"),
    "early_left_overlap_{k}": ("early: top-{k} left, overlap with final", ".1%"),
    "early_right_overlap_{k}": ("early: top-{k} right, overlap with final", ".1%"),
    "u1_evr": ("path of u1: variance in a plane", ".1%"),
    "u1_evr_null_mean": ("… of a random walk", ".1%"),
    "bf16_unchanged_share": ("entries unchanged in bf16", ".1%"),
    "update_density": ("entries changed by more than 0.1 %", ".1%"),
    "low_magnitude_overlap": ("changed entries in W0's smallest 30 %", ".1%"),
    "principal_overlap": ("changed entries in W0's principal 30 %", ".1%"),
    "base_rotation_left_mean_degrees": ("rotation of W0's top-{k}, left (°)", ".2f"),
    "base_rotation_right_mean_degrees": ("rotation of W0's top-{k}, right (°)", ".2f"),
    "base_spectral_shift": ("shift of W0's singular values", ".2%"),
    "rounding_noise_to_update": ("rounding of the files / update", ".2g"),
}
#: Metrics that serve as reference for the line above them.
_YARDSTICKS = ("effective_rank_noise_floor", "u1_evr_null_mean")


def metrics_table(summary: Mapping[str, Any]) -> Table:
    """Means of the final updates over attention and MLP matrices, one column per group."""
    groups, pair = summary["groups"], _only_pair(summary)
    header = ["", *(_heading(name, group) for name, group in groups.items()), *(["larger"] if pair else [])]
    norms = [estimate(group["update_norm"], ".4g") for group in groups.values()]
    rows = [["update norm, all parameters", *norms, *([_mark(pair["update_norm"])] if pair else [])]]
    for metric, name, style in _rows(summary):
        values = [group["metrics"].get(metric) for group in groups.values()]
        if all(value is None or value["mean"] is None for value in values):
            continue
        cells = [estimate(value, style) for value in values]
        difference = None if not pair or metric in _YARDSTICKS else pair["metrics"].get(metric)
        rows.append([name, *cells, *([_mark(difference)] if pair else [])])
    return Table(header, rows)


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, label, format) of the printed lines."""
    k = summary["settings"]["k"]
    rows = {metric.format(k=k): (name.format(k=k), style) for metric, (name, style) in _ROWS.items()}
    return [(metric, name, style) for metric, (name, style) in rows.items()]


def _heading(name: str, group: Mapping[str, Any]) -> str:
    seeds = len(group["runs"])
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def estimate(value: Mapping[str, Any] | None, style: str) -> str:
    """A mean with its interval as text; "–" without a value."""
    if value is None or value["mean"] is None:
        return "–"
    text = format(value["mean"], style)
    if value["low"] is None:
        return text
    percent = "" if not style.endswith("%") else "%"
    low, high = (format(value[end], style).removesuffix("%") for end in ("low", "high"))
    return f"{text.removesuffix('%')}{percent} [{low}, {high}]"


def _only_pair(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The difference between the groups if there are exactly two; otherwise `None`."""
    return summary["differences"][0] if len(summary["differences"]) == 1 else None


def _mark(difference: Mapping[str, Any] | None) -> str:
    """Name of the larger group; "·" if the difference is not significant, "" without interval."""
    if difference is None or all(difference.get(over) is None for over in ("over_matrices", "over_seeds")):
        return ""
    return difference["larger"] or "·"


def legend(summary: Mapping[str, Any]) -> list[str]:
    """Legend of the brackets and, for three or more groups, the significant differences."""
    over = {name: group["interval_over"] for name, group in summary["groups"].items()}
    kinds = sorted(set(over.values()))
    early = {
        f"{run['group']}: step {path['early_step']} of {path['steps'][-1]}"
        for run in summary["runs"].values()
        if (path := run["trajectory"])
    }
    lines = [f"Brackets: over {kinds[0]}." if len(kinds) == 1 else
             "Brackets: " + ", ".join(f"{name} over {kind}" for name, kind in over.items()) + "."]  # fmt: skip
    if "matrices" in kinds:
        lines[0] += " They do not cover the variation between runs; pass several seeds for that."
    if early:
        lines.append(f"early: the snapshot nearest to 10 % of training ({', '.join(sorted(early))}).")
    if len(summary["differences"]) == 1:
        lines.append("larger: the 95 % interval of the paired difference excludes 0; · means that it does not.")
        return lines
    for pair in summary["differences"]:
        by_side: dict[str | None, list[str]] = {}
        for metric, name, _ in _rows(summary):
            if metric in pair["metrics"] and metric not in _YARDSTICKS:
                by_side.setdefault(pair["metrics"][metric]["larger"], []).append(name.strip("… "))
        for larger, smaller in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
            if by_side.get(larger):
                lines.append(f"{larger} significantly above {smaller}: {'; '.join(by_side[larger])}.")
    return lines


def modules_table(summary: Mapping[str, Any]) -> Table:
    """Share of every module in the squared norm of the final update, and in the parameters."""
    groups, sizes = summary["groups"], summary["parts"]["modules"]
    total = sum(size["parameters"] for size in sizes.values())
    rows = []
    for module in (name for name in MODULE_COLORS if name in sizes):
        cells = [estimate(group["modules"][module]["share"], ".1%") for group in groups.values()]
        rows.append([module, *cells, f"{sizes[module]['parameters'] / total:.1%}"])
    return Table(["", *(_heading(name, group) for name, group in groups.items()), "parameters"], rows)
